"""Tables from the key layouts of SMCA to ours; the keys of the backbone have no rule here.

The single-scale and the convolutional model are those of gaopengcuhk/SMCA-DETR. The multi-scale
model of the paper was never published; its layout is that of a reconstruction which names its parts
as the published models do. All tables only rename: shapes agree as they are.
"""

from __future__ import annotations

from efficient_detr.checkpoint.conversion import KeyRule
from efficient_detr.checkpoint.official import (
    DECODER_LAYER,
    ENCODER_LAYER,
    OUR_DECODER_LAYER,
    OUR_ENCODER_LAYER,
    detr,
)

_OUR_ATTENTION = OUR_DECODER_LAYER + "cross_attention."


def smca() -> list[KeyRule]:
    """The single-scale model, with any type of scale."""
    return [
        KeyRule(DECODER_LAYER + r"norm4\.", _OUR_ATTENTION + "norm."),
        KeyRule(DECODER_LAYER + r"point1\.", _OUR_ATTENTION + "center_prediction."),
        KeyRule(DECODER_LAYER + r"point2\.", _OUR_ATTENTION + "head_offsets."),
        KeyRule(DECODER_LAYER + r"point3\.", _OUR_ATTENTION + "scale.projection."),
        *detr(),
    ]


def smca_conv() -> list[KeyRule]:
    """The multi-scale model with a convolutional encoder.

    Its convolutions between levels are numbered if every pair of levels has its own, and have no
    number if the pairs share one.
    """
    exchange = OUR_ENCODER_LAYER + "exchange."
    pairs = [
        KeyRule(rf"{ENCODER_LAYER}{theirs}_{pair + 1}\.", f"{exchange}{ours}.{pair}.")
        for theirs, ours in (("high_to_low", "down"), ("low_to_high", "up"))
        for pair in range(3)
    ]
    levels = [
        KeyRule(
            rf"{ENCODER_LAYER}self_attn_{stride}\.",
            f"{OUR_ENCODER_LAYER}level_convolutions.{level}.",
        )
        for level, stride in enumerate((8, 16, 32, 64))
    ]
    return [
        *levels,
        *pairs,
        KeyRule(ENCODER_LAYER + r"high_to_low\.", exchange + "down."),
        KeyRule(ENCODER_LAYER + r"low_to_high\.", exchange + "up."),
        KeyRule(ENCODER_LAYER + r"conv_1\.", OUR_ENCODER_LAYER + "input_projection."),
        KeyRule(ENCODER_LAYER + r"conv_2\.", OUR_ENCODER_LAYER + "output_projection."),
        KeyRule(ENCODER_LAYER + r"norm1\.", OUR_ENCODER_LAYER + "convolution_norm."),
        KeyRule(r"transformer\.conv\.", "detector.encoder.reduction."),
        *_several_levels(("512", "1024", "2048")),
    ]


def smca_multi_scale() -> list[KeyRule]:
    """The reconstruction of the paper's multi-scale model.

    Its names have neither `transformer.` nor `layers.`; in a model with a backbone they begin with
    `smca.`.
    """
    rules = _several_levels(("1024", "2048"))
    return [
        KeyRule(r"(?:smca\.)?decoder_norm\.", "detector.decoder.norm."),
        *(KeyRule(r"(?:smca\.)?" + _shortened(rule.pattern), rule.replacement) for rule in rules),
    ]


def _several_levels(maps: tuple[str, ...]) -> list[KeyRule]:
    """What the models with several levels add; `maps` are the channels of the backbone's maps."""
    projections = [
        KeyRule(rf"input_proj_{channels}\.", f"detector.neck.convs.{level}.")
        for level, channels in enumerate(maps)
    ]
    return [
        *projections,
        KeyRule(rf"input_proj_{maps[-1]}_3\.", "detector.neck.extra_convs.0."),
        KeyRule(r"transformer\.level_embed", "detector.tokenizer.level_embedding"),
        KeyRule(DECODER_LAYER + r"point4\.", _OUR_ATTENTION + "level_selection."),
        *smca(),
    ]


def _shortened(pattern: str) -> str:
    return pattern.replace(r"transformer\.", "").replace(r"layers\.(", "(")
