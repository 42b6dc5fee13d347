"""Checkpoint formats of SMCA-DETR.

The single-scale and the convolutional model are those of gaopengcuhk/SMCA-DETR. The multi-scale
model of the paper was never published; its layout is that of a reconstruction which names its parts
as the published models do.

All classifiers have a column more than there are COCO category numbers. It stands for "no object"
and is trained like a class without objects.
"""

from __future__ import annotations

from dataclasses import replace

from efficient_detr.checkpoint.conversion import Rename, Row
from efficient_detr.checkpoint.layout import CheckpointFormat, ClassRows
from efficient_detr.checkpoint.official import (
    DECODER_LAYER,
    ENCODER_LAYER,
    OUR_DECODER_LAYER,
    OUR_ENCODER_LAYER,
    detr,
    official_backbone,
)

_OUR_ATTENTION = OUR_DECODER_LAYER + "cross_attention."
_CLASS_ROWS = (ClassRows("detector.decoder.heads.{layer}.class_layer.*", unused=1),)


def smca() -> list[Row]:
    """The single-scale model, with any type of scale."""
    return [
        Rename(DECODER_LAYER + "norm4.*", _OUR_ATTENTION + "norm.*"),
        Rename(DECODER_LAYER + "point1.*", _OUR_ATTENTION + "center_prediction.*"),
        Rename(DECODER_LAYER + "point2.*", _OUR_ATTENTION + "head_offsets.*"),
        Rename(DECODER_LAYER + "point3.*", _OUR_ATTENTION + "scale.projection.*"),
        *detr(),
    ]


def smca_conv() -> list[Row]:
    """The multi-scale model with a convolutional encoder.

    Its convolutions between levels are numbered if every pair of levels has its own, and have no
    number if the pairs share one.
    """
    exchange = OUR_ENCODER_LAYER + "exchange."
    pairs = [
        Rename(f"{ENCODER_LAYER}{theirs}_{pair + 1}.*", f"{exchange}{ours}.{pair}.*")
        for theirs, ours in (("high_to_low", "down"), ("low_to_high", "up"))
        for pair in range(3)
    ]
    levels = [
        Rename(
            f"{ENCODER_LAYER}self_attn_{stride}.*",
            f"{OUR_ENCODER_LAYER}level_convolutions.{level}.*",
        )
        for level, stride in enumerate((8, 16, 32, 64))
    ]
    return [
        *levels,
        *pairs,
        Rename(ENCODER_LAYER + "high_to_low.*", exchange + "down.*"),
        Rename(ENCODER_LAYER + "low_to_high.*", exchange + "up.*"),
        Rename(ENCODER_LAYER + "conv_1.*", OUR_ENCODER_LAYER + "input_projection.*"),
        Rename(ENCODER_LAYER + "conv_2.*", OUR_ENCODER_LAYER + "output_projection.*"),
        Rename(ENCODER_LAYER + "norm1.*", OUR_ENCODER_LAYER + "convolution_norm.*"),
        Rename("transformer.conv.*", "detector.encoder.reduction.*"),
        *_several_levels(("512", "1024", "2048")),
    ]


def smca_multi_scale(prefix: str = "") -> list[Row]:
    """The reconstruction of the paper's multi-scale model.

    Args:
        prefix: what all of its names begin with. They have neither `transformer.` nor `layers.`
    """
    return [
        Rename(prefix + "decoder_norm.*", "detector.decoder.norm.*"),
        *(_shortened(row, prefix) for row in _several_levels(("1024", "2048"))),
    ]


def _several_levels(maps: tuple[str, ...]) -> list[Row]:
    """What the models with several levels add; `maps` are the channels of the backbone's maps."""
    projections = [
        Rename(f"input_proj_{channels}.*", f"detector.neck.convs.{level}.*")
        for level, channels in enumerate(maps)
    ]
    return [
        *projections,
        Rename(f"input_proj_{maps[-1]}_3.*", "detector.neck.extra_convs.0.*"),
        Rename("transformer.level_embed", "detector.tokenizer.level_embedding"),
        Rename(DECODER_LAYER + "point4.*", _OUR_ATTENTION + "level_selection.*"),
        *smca(),
    ]


def _shortened(row: Row, prefix: str) -> Row:
    """A row with the names of the reconstruction."""
    assert isinstance(row, Rename)
    theirs = row.theirs.replace("transformer.", "").replace("layers.{", "{")
    return replace(row, theirs=prefix + theirs)


def _format(
    name: str,
    title: str,
    rows: list[Row],
    *,
    marks: tuple[str, ...],
    excluded: tuple[str, ...] = (),
) -> CheckpointFormat:
    """A format whose table is the same for all sizes; `rows` are those behind the backbone."""
    table = [*official_backbone(), *rows]
    return CheckpointFormat(
        name=name,
        title=title,
        marks=marks,
        excluded=excluded,
        read_table=lambda _: table,
        write_table=lambda _: table,
        class_rows=_CLASS_ROWS,
    )


FORMATS = (
    _format(
        "smca",
        "SMCA-DETR of gaopengcuhk/SMCA-DETR",
        smca(),
        marks=(DECODER_LAYER + "point2.weight",),
        excluded=(DECODER_LAYER + "point4.weight",),
    ),
    _format(
        "smca_conv",
        "SMCA-DETR with a convolutional encoder of gaopengcuhk/SMCA-DETR",
        smca_conv(),
        marks=(DECODER_LAYER + "point4.weight", "transformer.conv.weight"),
    ),
    _format(
        "smca_multi_scale",
        "multi-scale SMCA-DETR",
        smca_multi_scale("smca."),
        marks=("smca.decoder.{layer}.point4.weight",),
    ),
    _format(
        "smca_multi_scale_transformer",
        "multi-scale SMCA-DETR without a backbone",
        smca_multi_scale(),
        marks=("decoder.{layer}.point4.weight",),
    ),
)
"""Formats of SMCA-DETR. ACT has the layout of DETR."""
