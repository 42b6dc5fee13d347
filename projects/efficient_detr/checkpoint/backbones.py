"""Checkpoints of backbones -> the backbone of whichever model has one, and back.

Known are DAT, DAT++, Swin and ResNet, as published and as in our own models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from efficient_detr.checkpoint.backbone_layouts import (
    BACKBONE_FORMATS,
    LAYOUTS,
    BackboneLayout,
    find_prefix,
)
from efficient_detr.checkpoint.conversion import (
    Drop,
    ReadState,
    Rename,
    Row,
    below,
    matches_template,
    read_keys,
    write_keys,
)
from efficient_detr.checkpoint.formats import without_wrappers
from efficient_detr.checkpoint.layout import Shape, Shapes
from efficient_detr.checkpoint.report import ConversionReport
from efficient_detr.checkpoint.shapes import resized_position_table
from efficient_detr.errors import UserError
from efficient_detr.modeling.classifier import ImageClassifier

_HEAD = "head."
# What classification models may have beside a backbone.
_CLASSIFIER_PARTS = ("head", "norm", "fc")
_HEAD_WEIGHTS = {"head.weight", "head.bias"}
_TABLE = "relative_position_bias_table"
_TABLE_INDEX = "relative_position_index"
_FIXED_TABLE = ".position_bias_table"
_COUNTER = ".num_batches_tracked"


@dataclass(frozen=True)
class ConvertedState:
    """The backbone of a checkpoint for a given model.

    Attributes:
        state: our name, from the root of the model -> tensor of the model's shape.
        report: what became of every weight.
    """

    state: dict[str, Tensor]
    report: ConversionReport


@dataclass(frozen=True)
class _Site:
    """Where the weights go.

    Attributes:
        backbone: start of the names of the backbone's weights.
        head: start of the names of the classification head's, None where there is none.
        shapes: name -> shape of all these weights.
    """

    backbone: str
    head: str | None
    shapes: dict[str, Shape]


def convert_backbone(
    state: Mapping[str, Tensor],
    model: nn.Module,
    source: str = "The checkpoint",
    target: str = "the model",
    *,
    format_name: str | None = None,
    other_parts: bool = True,
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
        target: the model, for errors.
        format_name: a name in `BACKBONE_FORMATS`, to look for this backbone alone and to take it
            from any file; None for all.
        other_parts: whether the file may have parts beyond a classifier, which are left out.

    Returns:
        None if there is no known backbone among the keys. Without `format_name`, also if the model
        has the backbone and other parts of the file under the same names: then it is a file of such
        a model.

    Raises:
        UserError: if the model has no such backbone, or one of another size, or the file has parts
            that it should not have.
    """
    state = without_wrappers(state)
    recognized = recognize_backbone(state, format_name)
    if recognized is None:
        return None
    layout, prefix = recognized
    inside = [key for key in state if key.startswith(prefix)]
    outside = [key for key in state if not key.startswith(prefix)]
    ours = model.state_dict().keys()
    same_names = not ours.isdisjoint(inside) and not ours.isdisjoint(outside)
    if same_names and format_name is None:
        return None
    state = {key.removeprefix(prefix): state[key] for key in inside}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    source = f"{source} ({layout.describe(shapes)})"
    site = _find_site(layout, model, source, target)
    read = _read(state, _rows(layout, site, shapes), site, source)
    report = ConversionReport(layout.title, site.backbone.rstrip("."))
    filling = _Filling(site, f"{source} does not fit {target}", report)
    report.dropped.update(read.dropped)
    report.leave_out_parts(outside, prefix)
    if not other_parts:
        refuse_other_parts(report, layout, source, target)
    for name, tensor in read.state.items():
        (key,) = read.sources[name]
        filling.place(name, tensor, key, shapes[key])
    report.initial = filling.unfilled(layout.output_norms)
    report.random_head = site.head is not None and f"{site.head}weight" in report.initial
    return ConvertedState(filling.state, report)


def export_backbone(
    state: Mapping[str, Tensor], format_name: str, source: str = "The checkpoint"
) -> dict[str, Tensor]:
    """Write the backbone of a checkpoint of ours in a published layout.

    The head of an `ImageClassifier` is written as well; all else around the backbone is left out.
    Constants that the published code stores with its weights are made anew.

    Args:
        state: our names, with any prefix.
        format_name: a name in `BACKBONE_FORMATS`.
        source: the file, for errors.

    Returns:
        Foreign key, relative to the backbone -> tensor; tensors may share memory.

    Raises:
        UserError: if there is no such format, no such backbone, or a weight without a place.
    """
    known = {one.name: one for one in BACKBONE_FORMATS}
    if format_name not in known:
        raise UserError(f"There is no backbone format {format_name!r}: know {', '.join(known)}.")
    form = known[format_name]
    state = without_wrappers(state)
    prefix = find_prefix(form.marks, state)
    if prefix is None:
        raise UserError(f"{source} cannot be written as {form.title}: it has no such backbone.")
    ours = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
    outer = _outer(prefix)
    rest = {key.removeprefix(outer): state[key] for key in state if not key.startswith(prefix)}
    classifies = rest.keys() == _HEAD_WEIGHTS
    if classifies:
        ours |= rest
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.items()}
    rows = [*(form.classifier if classifies else ()), *form.table(shapes)]
    try:
        return write_keys(ours, rows)
    except KeyError as error:
        reason = f"{source} cannot be written as {form.title}: {error.args[0]}"
        raise UserError(f"{reason}; that layout has no such part.") from error


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


def refuse_other_parts(
    report: ConversionReport, layout: BackboneLayout, source: str, target: str
) -> None:
    """Stop where the backbone is only one part of an unknown model.

    Args:
        report: of the backbone.
        layout: of the backbone.
        source: the file with its backbone.
        target: what it is for.

    Raises:
        UserError: if the file has more than a classifier has.
    """
    parts = [part for part in report.parts if part not in _CLASSIFIER_PARTS]
    if parts:
        raise UserError(
            f"{source} is of no known format apart from its backbone: {target} has no use for its "
            f"{', '.join(parts)}; take the backbone alone with --from {layout.name}, "
            "--allow-partial or train.allow_partial_checkpoint=True."
        )


def recognize_backbone(
    keys: Collection[str], format_name: str | None = None
) -> tuple[BackboneLayout, str] | None:
    """The layout of a backbone among keys and the prefix of its names, None if there is none.

    Args:
        keys: of a file.
        format_name: the only one to look for; None for all.
    """
    for layout in LAYOUTS:
        if format_name not in (None, layout.name):
            continue
        prefix = find_prefix(layout.marks, keys)
        if prefix is not None:
            return layout, prefix
    return None


def _outer(prefix: str) -> str:
    """What stands before the names of the module around a backbone."""
    outer = prefix.removesuffix(".").rpartition(".")[0]
    return outer and f"{outer}."


def _find_site(layout: BackboneLayout, model: nn.Module, source: str, target: str) -> _Site:
    """Find the only backbone of the layout's class, and the classifier around it."""
    kind = layout.module
    modules = dict(model.named_modules())
    paths = [path for path, module in modules.items() if isinstance(module, kind)]
    if not paths:
        raise UserError(
            f"{source} is for a {kind.__name__}, but {target} has none: choose a config with this "
            "backbone, or another train.init_checkpoint."
        )
    if len(paths) > 1:
        raise UserError(
            f"{source} is for one {kind.__name__}, but {target} has {len(paths)} "
            f"({', '.join(paths)}): load it into one of them by a script."
        )
    outer = paths[0].rpartition(".")[0]
    classifies = paths[0] != outer and isinstance(modules[outer], ImageClassifier)
    backbone = paths[0] and f"{paths[0]}."
    head = f"{outer}.{_HEAD}".lstrip(".") if classifies else None
    prefixes = (backbone,) if head is None else (backbone, head)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.startswith(prefixes) and not name.endswith(_TABLE_INDEX)
    }
    return _Site(backbone, head, shapes)


def _rows(layout: BackboneLayout, site: _Site, shapes: Shapes) -> list[Row]:
    """The table for one file and one model; ours are names from the root of the model."""
    rows: list[Row] = [
        Drop(row.theirs, "stages after the last output")
        for row in layout.last_stages
        if not _has(site, row)
    ]
    from_detector = layout.output_norms
    if site.head is None:
        heads = layout.head + layout.head_norm
        rows += [Drop(row.theirs, "parts of a classification head") for row in heads]
    else:
        rows += [Rename(row.theirs, f"{site.head}*") for row in layout.head]
        rows += below(layout.head_norm, "", site.backbone)
        if any(matches_template(row.theirs, key) for row in layout.head_norm for key in shapes):
            # Of a backbone that was trained further in a detector, while the head was not.
            rows += [Drop(row.theirs, "norms of a detector's outputs") for row in from_detector]
            from_detector = ()
    for row in from_detector:
        unused = Drop(row.theirs, "norms of outputs that are not used")
        rows += below([row], "", site.backbone) if _has(site, row) else [unused]
    return rows + below(layout.table(shapes), "", site.backbone)


def _has(site: _Site, row: Rename) -> bool:
    """Whether the model has weights that a row is for."""
    return any(matches_template(site.backbone + row.ours, name) for name in site.shapes)


def _read(state: Mapping[str, Tensor], rows: Sequence[Row], site: _Site, source: str) -> ReadState:
    """Our names for all keys.

    Raises:
        UserError: if a key is unknown or doubled.
    """
    try:
        read = read_keys(state, rows, site.shapes)
    except KeyError as error:
        raise UserError(f"{source} cannot be converted: {error.args[0]}.") from error
    if read.unknown:
        raise UserError(
            f"{source} cannot be converted: {read.unknown[0]} is no part of such a backbone."
        )
    return read


@dataclass
class _Filling:
    """The weights of a backbone while they are collected.

    Attributes:
        site: where they go.
        problem: start of the sentence for a file that does not fit.
        report: what became of each.
        state: our name -> tensor of the model's shape.
    """

    site: _Site
    problem: str
    report: ConversionReport
    state: dict[str, Tensor] = field(default_factory=dict)

    def place(self, name: str, tensor: Tensor, key: str, before: Shape) -> None:
        """Take a tensor in the shape that the model wants, or note why it is not used.

        Args:
            name: ours.
            tensor: as read.
            key: in the file.
            before: shape in the file.

        Raises:
            UserError: if the model has no place for it.
        """
        after = self.site.shapes.get(name)
        if after is None:
            if not _pools_keys(name, self.site):
                raise self._misfit(f"{key} (ours: {name}) has no place in it")
            self.report.dropped[key] = "offset networks where keys are pooled"
        elif tensor.shape == after and before in (after, (*after, 1, 1)):
            self.state[name] = tensor
            self._note(name, key, before, after)
        elif (table := _resized(name, tensor, after)) is not None:
            self.state[name] = table
            self.report.resized[name] = before, after
        elif name.endswith(_FIXED_TABLE):
            self.report.dropped[key] = "fixed position tables of another size"
        else:
            raise self._other_shape(name, key, before, after)

    def unfilled(self, output_norms: Sequence[Rename]) -> list[str]:
        """Names of weights of the model that the file does not have.

        Args:
            output_norms: rows of what only checkpoints of detectors have.

        Raises:
            UserError: if one of them is neither of an output norm nor of a head nor a fixed table.
        """
        optional = [self.site.backbone + row.ours for row in output_norms]
        if self.site.head is not None:
            optional.append(f"{self.site.head}*")
        missing = [name for name in self.site.shapes if name not in self.state]
        # Files of frozen norms count no batches of training, and nothing depends on their number.
        initial = [name for name in missing if not name.endswith(_COUNTER)]
        for name in initial:
            allowed = any(matches_template(template, name) for template in optional)
            if not allowed and not name.endswith(_FIXED_TABLE):
                raise self._misfit(f"it has no weights for {name}")
        return initial

    def _note(self, name: str, key: str, before: Shape, after: Shape) -> None:
        """Report a tensor that keeps its values."""
        if before != after:
            self.report.reshaped[name] = before, after
        elif name == self.site.backbone + key:
            self.report.matched.append(name)
        else:
            self.report.renamed[name] = key

    def _other_shape(self, name: str, key: str, before: Shape, after: Shape) -> UserError:
        problem = f"{key} has the shape {before}, but {name} has {after}"
        in_head = self.site.head is not None and name.startswith(self.site.head)
        # With another width the file is of another variant, whatever the number of classes.
        if in_head and before[1:] == after[1:]:
            return self._misfit(problem, f"set model.num_classes={before[0]}")
        return self._misfit(problem)

    def _misfit(
        self, reason: str, advice: str = "choose the variant of the file in the config"
    ) -> UserError:
        return UserError(f"{self.problem}: {reason}; {advice}.")


def _resized(name: str, tensor: Tensor, shape: Shape) -> Tensor | None:
    return resized_position_table(tensor, shape) if name.endswith(_TABLE) else None


def _pools_keys(name: str, site: _Site) -> bool:
    """Whether a missing name is that of an offset network in an attention that needs none."""
    attention, offsets, _ = name.partition("keys.offset_network.")
    return bool(offsets) and f"{attention}query.weight" in site.shapes
