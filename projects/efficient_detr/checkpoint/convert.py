"""Published checkpoints of detectors -> ours, and back.

The table of a format says what a key is called here. Around the tables everything is the same for
all formats: which rows of a class layer belong to which class, whether a model is filled without
rest, and what the report says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from efficient_detr.checkpoint.backbone_layouts import LAYOUTS, BackboneLayout, find_prefix
from efficient_detr.checkpoint.backbones import (
    convert_backbone,
    export_backbone,
    without_parallel_prefix,
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
    describe_unknown,
    find_format,
    is_backbone_format,
    recognize_format,
)
from efficient_detr.checkpoint.layout import ClassRows
from efficient_detr.checkpoint.report import ConversionReport
from efficient_detr.errors import UserError

__all__ = ["Conversion", "convert_checkpoint", "export_checkpoint"]

_COUNTERS = (".total_ops", ".total_params")
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
    counted = {key: "counters of a profiler" for key in state if key.endswith(_COUNTERS)}
    weights = without_parallel_prefix({key: state[key] for key in state if key not in counted})
    if source_format is None:
        found = recognize_format(weights.keys())
    else:
        found = None if is_backbone_format(source_format) else find_format(source_format)
    if found is None:
        conversion = _convert_backbone(weights, model, source, target)
    else:
        converter = DetectorConverter(
            found,
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


def _convert_backbone(
    weights: Mapping[str, Tensor], model: nn.Module | None, source: str, target: str
) -> Conversion:
    """Convert a file of which at most the backbone is known.

    Raises:
        UserError: if it is not known either, or does not fit.
    """
    if model is not None:
        converted = convert_backbone(weights, model, source, target)
        if converted is not None:
            return Conversion(converted.state, converted.report, None)
    for layout in LAYOUTS:
        prefix = find_prefix(layout.marks, weights.keys())
        if model is None and prefix is not None:
            return _rename_backbone(weights, layout, prefix, source)
    raise UserError(f"{source} is none for {target}: {describe_unknown(weights.keys())}.")


def _rename_backbone(
    weights: Mapping[str, Tensor], layout: BackboneLayout, prefix: str, source: str
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
        UserError: if there is no such format, it has no place for a weight, or `coco_ids` is given
            for a detector of other classes.
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
    return understood(lambda: write_keys(ours, layout.write_table(shapes)), problem)


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
