"""Checkpoints with a DAT, DAT++ or Swin backbone into the backbone of whichever model has one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from detectron2.modeling import SwinTransformer
from torch import Tensor, nn

from efficient_detr.checkpoint.conversion import KeyRule, rename_keys
from efficient_detr.checkpoint.dat import (
    dat_backbone,
    dat_output_norms,
    own_dat_backbone,
    own_dat_output_norms,
)
from efficient_detr.checkpoint.report import LoadReport
from efficient_detr.checkpoint.shapes import is_pointwise, resized_position_table, without_kernel
from efficient_detr.checkpoint.swin import swin_backbone, swin_output_norms
from efficient_detr.errors import UserError
from efficient_detr.modeling.backbones.dat import DAT
from efficient_detr.modeling.backbones.dat_variants import VARIANTS
from efficient_detr.modeling.classifier import ImageClassifier

Sizes = tuple[int, ...]
"""A number for each stage."""

_ANY_PREFIX = r"((?:[^.]+\.)*?)"
_PARALLEL_PREFIX = "module."
_TABLE = "relative_position_bias_table"
_TABLE_INDEX = "relative_position_index"
_FIXED_TABLE = ".position_bias_table"

_DAT_VARIANTS: Mapping[str, tuple[Sizes, Sizes]] = {
    name: (
        tuple(len(stage.attention) for stage in variant.stages),
        tuple(stage.channels for stage in variant.stages),
    )
    for name, variant in VARIANTS.items()
}


@dataclass(frozen=True)
class BackboneLayout:
    """How a backbone is named in a file.

    Attributes:
        name: for messages.
        module: our class of the backbone.
        marks: patterns of keys by which the layout is recognised, each of which must be there.
        backbone: table for the keys of the backbone, made from all of them.
        output_norms: table for the norms of outputs, which only checkpoints of detectors have.
        head: pattern of the classification head, None where it is not among the backbone's keys.
        head_norm: the norm before it, (pattern, our name relative to the backbone), None as above.
        width: pattern of one weight (C,) of each stage, whose group is the stage.
        depth: pattern of keys of blocks, whose groups are stage and block.
        variants: name of a published model -> blocks and channels of its stages.
    """

    name: str
    module: type[nn.Module]
    marks: tuple[str, ...]
    backbone: Callable[[Iterable[str]], list[KeyRule]]
    output_norms: tuple[KeyRule, ...]
    head: str | None
    head_norm: tuple[str, str] | None
    width: str
    depth: str
    variants: Mapping[str, tuple[Sizes, Sizes]]


LAYOUTS = (
    BackboneLayout(
        name="DAT",
        module=DAT,
        marks=(r"patch_proj\.0\.weight$", r"stages\.0\.layer_norms\.0\.norm\."),
        backbone=dat_backbone,
        output_norms=dat_output_norms(),
        head=r"cls_head\.",
        head_norm=(r"cls_norm\.norm\.", "output_norms.p3."),
        width=r"stages\.(\d+)\.layer_norms\.0\.norm\.weight$",
        depth=r"stages\.(\d+)\.mlps\.(\d+)\.",
        variants=_DAT_VARIANTS,
    ),
    # Of our own classifiers and detectors. Swin needs no second entry: its names are the same.
    BackboneLayout(
        name="DAT",
        module=DAT,
        marks=(
            r"stages\.0\.merging\.(first\.)?convolution\.weight$",
            r"stages\.0\.blocks\.0\.attention_norm\.weight$",
        ),
        backbone=own_dat_backbone,
        output_norms=own_dat_output_norms(),
        head=None,
        head_norm=None,
        width=r"stages\.(\d+)\.blocks\.0\.attention_norm\.weight$",
        depth=r"stages\.(\d+)\.blocks\.(\d+)\.",
        variants=_DAT_VARIANTS,
    ),
    BackboneLayout(
        name="Swin",
        module=SwinTransformer,
        marks=(r"patch_embed\.proj\.weight$", r"layers\.0\.blocks\.0\.attn\.qkv\.weight$"),
        backbone=swin_backbone,
        output_norms=swin_output_norms(),
        head=r"head\.",
        head_norm=(r"norm\.", "norm3."),
        width=r"layers\.(\d+)\.blocks\.0\.norm1\.weight$",
        depth=r"layers\.(\d+)\.blocks\.(\d+)\.",
        variants={
            "Swin-T": ((2, 2, 6, 2), (96, 192, 384, 768)),
            "Swin-S": ((2, 2, 18, 2), (96, 192, 384, 768)),
            "Swin-B": ((2, 2, 18, 2), (128, 256, 512, 1024)),
            "Swin-L": ((2, 2, 18, 2), (192, 384, 768, 1536)),
        },
    ),
)
"""The layouts that are known: as published, and ours."""


@dataclass(frozen=True)
class ConvertedState:
    """The backbone of a checkpoint for a given model.

    Attributes:
        state: our name, from the root of the model -> tensor of the model's shape.
        report: what became of every weight.
    """

    state: dict[str, Tensor]
    report: LoadReport


@dataclass(frozen=True)
class _Site:
    """Where the weights go.

    Attributes:
        backbone: start of the names of the backbone's parameters.
        head: start of the names of the classification head's, None where there is none.
        shapes: name -> shape of all these parameters.
    """

    backbone: str
    head: str | None
    shapes: dict[str, tuple[int, ...]]


def convert_backbone(
    state: Mapping[str, Tensor], model: nn.Module, source: str = "The checkpoint"
) -> ConvertedState | None:
    """Convert a checkpoint that has a known backbone for a model that contains such a backbone.

    The backbone may lie anywhere in the model: below a detector, below a feature pyramid, or be the
    model itself. It may lie anywhere in the file as well; other parts of the file, such as those of
    another detector, are left out. The head of a classification checkpoint goes into an
    `ImageClassifier` and nowhere else.

    Args:
        state: keys as published or as in our models, with any prefix.
        model: what the weights are for.
        source: the file, for errors.

    Returns:
        None if there is no known backbone among the keys, or if the model has the backbone and
        other parts of the file under the same names: then it is a file of such a model.

    Raises:
        UserError: if the model has no such backbone, or one of another size.
    """
    state = without_parallel_prefix(state)
    recognized = _recognize(state)
    if recognized is None:
        return None
    layout, prefix = recognized
    inside = [key for key in state if key.startswith(prefix)]
    outside = [key for key in state if not key.startswith(prefix)]
    ours = model.state_dict().keys()
    if not ours.isdisjoint(inside) and not ours.isdisjoint(outside):
        return None
    state = {key.removeprefix(prefix): state[key] for key in inside}
    source = f"{source} ({_description(layout, state)})"
    site = _find_site(layout, model, source)
    report = LoadReport(layout.name, site.backbone.rstrip("."))
    try:
        renamed = rename_keys(state, _rules(layout, site, state), site.shapes)
    except KeyError as error:
        raise UserError(f"{source} cannot be converted: {error.args[0]}") from error
    report.dropped.update(renamed.dropped)
    report.leave_out_parts(outside, prefix)
    converted = {}
    for name, key in renamed.names.items():
        tensor = _fitted(state[key], name, key, site, report, source)
        if tensor is not None:
            converted[name] = tensor
    report.initial = _unfilled(layout, site, converted, source)
    report.random_head = site.head is not None and f"{site.head}weight" not in converted
    return ConvertedState(converted, report)


def without_parallel_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The keys without the prefix that PyTorch's modules for parallel training give to all."""
    if not state or not all(key.startswith(_PARALLEL_PREFIX) for key in state):
        return state
    return {key.removeprefix(_PARALLEL_PREFIX): tensor for key, tensor in state.items()}


def resize_tables(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What fits a file to a model with the same names but windows of other sizes.

    Args:
        state: keys as in the model.
        model: what the weights are for.

    Returns:
        Key -> tensor of the model's shape, for those whose shape was another one: interpolated
        tables of relative positions, and the model's own indices into them.
    """
    ours = model.state_dict()
    fitted = {}
    for name, tensor in state.items():
        if name not in ours or tensor.shape == ours[name].shape:
            continue
        if name.endswith(_TABLE_INDEX):
            fitted[name] = ours[name]
        elif name.endswith(_TABLE):
            table = resized_position_table(tensor, tuple(ours[name].shape))
            if table is not None:
                fitted[name] = table
    return fitted


def _recognize(state: Iterable[str]) -> tuple[BackboneLayout, str] | None:
    """The layout of a file and the prefix of the backbone's keys, the shortest if several."""
    keys = list(state)
    for layout in LAYOUTS:
        prefixes = [_prefixes(mark, keys) for mark in layout.marks]
        common = set.intersection(*prefixes)
        if common:
            return layout, min(common, key=_length_and_name)
    return None


def _prefixes(mark: str, keys: Iterable[str]) -> set[str]:
    """What stands before a mark, where the mark begins with a whole name."""
    pattern = re.compile(_ANY_PREFIX + mark)
    return {match[1] for match in map(pattern.match, keys) if match}


def _length_and_name(prefix: str) -> tuple[int, str]:
    return len(prefix), prefix


def _description(layout: BackboneLayout, state: Mapping[str, Tensor]) -> str:
    """Name and sizes of the backbone in a file, and which published models have these sizes."""
    depths: Counter[int] = Counter()
    widths: dict[int, int] = {}
    for key, tensor in state.items():
        if match := re.match(layout.depth, key):
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
        if match := re.match(layout.width, key):
            widths[int(match[1])] = len(tensor)
    sizes = (
        tuple(depths[stage] for stage in sorted(depths)),
        tuple(widths[stage] for stage in sorted(widths)),
    )
    blocks, channels = ("-".join(map(str, size)) for size in sizes)
    names = " or ".join(name for name, variant in layout.variants.items() if variant == sizes)
    return f"{layout.name} with {blocks} blocks of {channels} channels{names and f', {names}'}"


def _find_site(layout: BackboneLayout, model: nn.Module, source: str) -> _Site:
    """Find the only backbone of the layout's class, and the classifier around it."""
    kind = layout.module
    modules = dict(model.named_modules())
    paths = [path for path, module in modules.items() if isinstance(module, kind)]
    if not paths:
        raise UserError(
            f"{source} is for a {kind.__name__}, but the model has none: choose a config with this "
            "backbone, or another train.init_checkpoint."
        )
    if len(paths) > 1:
        raise UserError(
            f"{source} is for one {kind.__name__}, but the model has {len(paths)} "
            f"({', '.join(paths)}): load it into one of them by a script."
        )
    outer = paths[0].rpartition(".")[0]
    classifies = paths[0] != outer and isinstance(modules[outer], ImageClassifier)
    backbone = paths[0] and f"{paths[0]}."
    head = f"{outer}.head.".lstrip(".") if classifies else None
    prefixes = (backbone,) if head is None else (backbone, head)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.startswith(prefixes)
    }
    return _Site(backbone, head, shapes)


def _rules(layout: BackboneLayout, site: _Site, keys: Collection[str]) -> list[KeyRule]:
    """The table for one file and one model; ours are names from the root of the model."""
    norms = _output_norms(layout, site)
    head = []
    if layout.head is not None and layout.head_norm is not None:
        head_norm, our_head_norm = layout.head_norm
        if site.head is None:
            head = [
                KeyRule(pattern, None, "parts of a classification head")
                for pattern in (layout.head, head_norm)
            ]
        else:
            head = [
                KeyRule(layout.head, site.head),
                KeyRule(head_norm, site.backbone + our_head_norm),
            ]
            if any(re.match(head_norm, key) for key in keys):
                # Of a backbone that was trained further in a detector, while the head was not.
                norms = [
                    KeyRule(rule.pattern, None, "norms of a detector's outputs")
                    for rule in layout.output_norms
                ]
    return [
        *head,
        *norms,
        *(rule.below("", site.backbone) for rule in layout.backbone(keys)),
    ]


def _output_norms(layout: BackboneLayout, site: _Site) -> list[KeyRule]:
    """The norms that the backbone of the model has; the others are dropped."""
    rules = [rule.below("", site.backbone) for rule in layout.output_norms]
    return [
        rule
        if any(name.startswith(str(rule.replacement)) for name in site.shapes)
        else KeyRule(rule.pattern, None, "norms of outputs that are not used")
        for rule in rules
    ]


def _fitted(
    tensor: Tensor, name: str, key: str, site: _Site, report: LoadReport, source: str
) -> Tensor | None:
    """A tensor in the shape that the model wants, None if it is not used; notes what happened."""
    if name not in site.shapes:
        if _pools_keys(name, site):
            report.dropped[key] = "offset networks where keys are pooled"
            return None
        raise _misfit(source, f"{key} (ours: {name}) has no place in it")
    before, after = tuple(tensor.shape), site.shapes[name]
    if before == after:
        report.matched.append(name)
        return tensor
    if is_pointwise(before, after):
        report.reshaped[name] = before, after
        return without_kernel(tensor)
    if name.endswith(_TABLE):
        resized = resized_position_table(tensor, after)
        if resized is not None:
            report.resized[name] = before, after
            return resized
    if name.endswith(_FIXED_TABLE):
        report.dropped[key] = "fixed position tables of another size"
        return None
    problem = f"{key} has the shape {before}, but {name} has {after}"
    in_head = site.head is not None and name.startswith(site.head)
    # With another width the file is of another variant, whatever the number of classes.
    if in_head and before[1:] == after[1:]:
        raise _misfit(source, problem, f"set model.num_classes={before[0]}")
    raise _misfit(source, problem)


def _misfit(
    source: str, problem: str, advice: str = "choose the variant of the file in the config"
) -> UserError:
    return UserError(f"{source} does not fit the model: {problem}; {advice}.")


def _pools_keys(name: str, site: _Site) -> bool:
    """Whether a missing name is that of an offset network in an attention that needs none."""
    attention, offsets, _ = name.partition("keys.offset_network.")
    return bool(offsets) and f"{attention}query.weight" in site.shapes


def _unfilled(
    layout: BackboneLayout, site: _Site, state: Mapping[str, Tensor], source: str
) -> list[str]:
    """Names of parameters without weights.

    Raises:
        UserError: if one of them is neither of an output norm nor of a head nor a fixed table.
    """
    optional = tuple(f"{site.backbone}{rule.replacement}" for rule in layout.output_norms)
    if site.head is not None:
        optional += (site.head,)
    initial = [name for name in site.shapes if name not in state]
    for name in initial:
        if not name.startswith(optional) and not name.endswith(_FIXED_TABLE):
            raise _misfit(source, f"it has no weights for {name}")
    return initial
