"""Published checkpoints of detectors -> ours, and back.

The table of a format says what a key is called here. Around the tables everything is the same for
all formats: which rows of a class layer belong to which class, whether a model is filled without
rest, and what the report says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from efficient_detr.checkpoint.backbone_layouts import BackboneLayout
from efficient_detr.checkpoint.backbones import (
    convert_backbone,
    export_backbone,
    recognize_backbone,
    refuse_other_parts,
)
from efficient_detr.checkpoint.classes import (
    COCO_CLASSES,
    COCO_IDS,
    background_rows,
    never_rows,
    spread_to_coco_ids,
)
from efficient_detr.checkpoint.conversion import (
    Drop,
    Row,
    below,
    read_keys,
    write_keys,
)
from efficient_detr.checkpoint.converter import (
    CLASS_LAYER,
    Conversion,
    DetectorConverter,
    understood,
)
from efficient_detr.checkpoint.formats import (
    OWN_FORMAT,
    describe_unknown,
    find_format,
    is_backbone_format,
    recognize_format,
    without_wrappers,
)
from efficient_detr.checkpoint.layout import CheckpointFormat, ClassRows
from efficient_detr.checkpoint.report import ConversionReport
from efficient_detr.errors import UserError

__all__ = [
    "Conversion",
    "clean_weights",
    "convert_backbone_of_file",
    "convert_checkpoint",
    "export_checkpoint",
]

_COUNTERS = ("total_ops", "total_params")
_BACKBONE = "detector.backbone."


def convert_checkpoint(
    state: Mapping[str, Tensor],
    *,
    source_format: str | None = None,
    model: nn.Module | None = None,
    class_names: Sequence[str] | None = None,
    source_class_names: Sequence[str] | None = None,
    fresh_heads: bool = False,
    allow_partial: bool = False,
    keep_classes: bool = False,
    source: str = "The checkpoint",
    target: str = "the model",
) -> Conversion:
    """Give a checkpoint our names, and the classes and shapes of a model.

    Nothing is loaded: what is returned fits as a whole, or an error is raised.

    Args:
        state: keys as published, or ours; also behind the prefix of parallel training.
        source_format: name of the format; None to recognise it from the keys.
        model: what the weights are for. Without one, names and shapes are not compared with
            anything, and heads of others with a row for each of COCO's 91 category numbers are put
            into Detectron2's order of the 80 classes.
        class_names: of the model's classes, in order; None for those that their number suggests (80
            and 91: COCO).
        source_class_names: of the file's classes, likewise.
        fresh_heads: for training. Rows of classes that the file does not have, and queries of
            another number, keep the model's initial values instead of being an error.
        allow_partial: take whatever fits; the report lists the rest.
        keep_classes: without a model, leave the rows of classes as they are.
        source: the file, for errors.
        target: the model, for errors.

    Returns:
        The weights and the report. With `fresh_heads` and `allow_partial`, weights of the model may
        be missing among them.

    Raises:
        UserError: if the format is unknown, or the file and the model do not fit.
    """
    weights, counted = clean_weights(state)
    found = _find_format(weights, source_format, model, source)
    conversion = None
    if found is None:
        conversion = convert_backbone_of_file(
            weights,
            model,
            format_name=source_format,
            allow_partial=allow_partial,
            source=source,
            target=target,
        )
    if conversion is None:
        if found is None and not _named_alike(weights, model):
            raise UserError(f"{source} is none for {target}: {describe_unknown(weights.keys())}.")
        converter = DetectorConverter(
            found or OWN_FORMAT,
            model,
            class_names=class_names,
            source_class_names=source_class_names,
            fresh_heads=fresh_heads,
            allow_partial=allow_partial,
            keep_classes=keep_classes,
            source=source,
            target=target,
        )
        conversion = converter.convert(weights)
    conversion.report.dropped.update(counted)
    return conversion


def clean_weights(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds of a model.

    Args:
        state: keys as in the file.

    Returns:
        The weights, without prefixes that all keys have; and key -> reason for what is none.
    """
    counters = [key for key in state if key.rpartition(".")[2] in _COUNTERS]
    weights = {key: tensor for key, tensor in state.items() if key not in set(counters)}
    return dict(without_wrappers(weights)), dict.fromkeys(counters, "counters of a profiler")


def _find_format(
    weights: Mapping[str, Tensor], name: str | None, model: nn.Module | None, source: str
) -> CheckpointFormat | None:
    """The format of a whole detector; None if there is none, or the backbone alone is wanted.

    Raises:
        UserError: if the file is not of the named format.
    """
    recognized = recognize_format(weights.keys())
    if name is None or is_backbone_format(name):
        return recognized if name is None else None
    named = find_format(name)
    if named.fits(weights.keys()) or (named is OWN_FORMAT and _named_alike(weights, model)):
        return named
    actual = describe_unknown(weights.keys())
    if recognized is not None:
        actual = f"its keys are those of {recognized.name} ({recognized.title})"
    raise UserError(
        f"{source} is not of the format {named.name} ({named.title}): {actual}; leave out --from, "
        "or give it the format of the file."
    )


def _named_alike(weights: Mapping[str, Tensor], model: nn.Module | None) -> bool:
    """Whether a file and a model, such as one of Detectron2's, have names in common."""
    return model is not None and not model.state_dict().keys().isdisjoint(weights)


def convert_backbone_of_file(
    weights: Mapping[str, Tensor],
    model: nn.Module | None,
    *,
    format_name: str | None = None,
    allow_partial: bool = False,
    source: str = "The checkpoint",
    target: str = "the model",
) -> Conversion | None:
    """Convert the backbone of a file that is no known detector.

    Args:
        weights: keys as published, or ours.
        model: what they are for; None if unknown.
        format_name: of the backbone, to take it alone; None if unknown.
        allow_partial: take it alone, whatever else is in the file.
        source: the file, for errors.
        target: the model, for errors.

    Returns:
        None if no backbone is known, or the file is of such a model.

    Raises:
        UserError: if the backbone does not fit, is not of that format, or is not alone.
    """
    found = recognize_backbone(weights.keys(), format_name)
    if found is None and format_name is not None:
        raise UserError(
            f"{source} has no backbone of the format {format_name}: leave out --from, or give it "
            "the format of the file."
        )
    if found is None:
        return None
    alone = not allow_partial and format_name is None
    if model is None:
        return _rename_backbone(weights, *found, source, target, alone)
    converted = convert_backbone(
        weights, model, source, target, format_name=format_name, other_parts=not alone
    )
    if converted is None:
        return None
    report = converted.report
    known = {*converted.state, *report.initial}
    # Nobody misses a count of batches.
    names = (name for name in model.state_dict() if not name.endswith("num_batches_tracked"))
    report.initial += [name for name in names if name not in known]
    return Conversion(converted.state, report, None)


def _rename_backbone(
    weights: Mapping[str, Tensor],
    layout: BackboneLayout,
    prefix: str,
    source: str,
    target: str,
    alone: bool,
) -> Conversion:
    """Give a backbone the names that it has in our detectors."""
    inside = {key.removeprefix(prefix): key for key in weights if key.startswith(prefix)}
    shapes = {key: tuple(weights[inside[key]].shape) for key in inside}
    rows: list[Row] = [
        *(
            Drop(row.theirs, "of a classification head")
            for row in (*layout.head, *layout.head_norm)
        ),
        *below([*layout.output_norms, *layout.table(shapes)], "", _BACKBONE),
    ]
    read = understood(
        lambda: read_keys({key: weights[inside[key]] for key in inside}, rows),
        f"{source} cannot be converted",
    )
    report = ConversionReport(layout.title, _BACKBONE.rstrip("."))
    report.renamed = {name: inside[keys[0]] for name, keys in read.sources.items()}
    report.dropped = {inside[key]: reason for key, reason in read.dropped.items()}
    report.leave_out_parts((key for key in weights if not key.startswith(prefix)), prefix)
    if alone:
        refuse_other_parts(report, layout, f"{source} ({layout.describe(shapes)})", target)
    if read.unknown:
        raise UserError(
            f"{source} cannot be converted: {layout.describe(shapes)} has no {read.unknown[0]}."
        )
    return Conversion(read.state, report, None)


# Back --------------------------------------------------------------------------------------------


def export_checkpoint(
    state: Mapping[str, Tensor],
    target_format: str,
    *,
    coco_ids: bool = False,
    source: str = "The checkpoint",
) -> dict[str, Tensor]:
    """Write our weights in a published layout, with everything that it stores twice.

    Args:
        state: our name -> tensor, a whole detector; for a format of backbones anything with one.
        target_format: name of the format.
        coco_ids: put the rows of COCO's 80 classes at their 91 category numbers, as most authors
            number them. Rows of numbers that COCO never gave have logits of -20.
        source: the file, for errors.

    Returns:
        foreign key -> tensor; tensors may share memory.

    Raises:
        UserError: if there is no such format, the model is none that it is for, it has no place for
            a weight, or `coco_ids` is given for a detector of other classes.
    """
    if is_backbone_format(target_format):
        return export_backbone(state, target_format, source)
    layout = find_format(target_format)
    problem = f"{source} cannot be written as {layout.title}"
    before = {name: tuple(tensor.shape) for name, tensor in state.items()}
    ours = {
        name: _published_rows(tensor, name, layout.class_rule(name, before), coco_ids, problem)
        for name, tensor in state.items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    written = understood(lambda: write_keys(ours, layout.write_table(shapes)), problem)
    if not layout.fits(written.keys()):
        actual = recognize_format(written.keys())
        advice = f"; write it as {actual.name} ({actual.title})" if actual else ""
        raise UserError(f"{problem}: its weights are those of another model{advice}.")
    return written


def _published_rows(
    tensor: Tensor, name: str, rule: ClassRows | None, coco_ids: bool, problem: str
) -> Tensor:
    """A weight of ours with all the rows that the published one has."""
    if rule is None:
        return tensor
    background = background_rows(len(tensor)) if CLASS_LAYER in name else 0
    if coco_ids and len(tensor) != COCO_IDS + background:
        if len(tensor) != COCO_CLASSES + background:
            raise UserError(
                f"{problem} with COCO's category numbers: {name} has {len(tensor)} rows, which are "
                f"not those of COCO's {COCO_CLASSES} classes."
            )
        tensor = spread_to_coco_ids(name, tensor, background=background, in_order=rule.in_order)
    # A model may have been given a class for each unused row.
    if not rule.unused or len(tensor) == COCO_IDS + rule.unused:
        return tensor
    return torch.cat([tensor, never_rows(name, tensor, rule.unused)])
