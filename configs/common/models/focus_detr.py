"""Focus-DETR as a LazyConfig: DINO with a token selection and dual attention in the encoder."""

from detectron2.config import LazyCall as L

from efficient_detr.losses import ForegroundLoss, SideDistanceForeground
from efficient_detr.modeling.attention import (
    DeformableEncoderAttention,
    ObjectSelfAttention,
    SelfAttention,
)
from efficient_detr.modeling.encoder import DualAttentionEncoderLayer, InitialValues
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.selection import (
    ForegroundScoreHead,
    ForegroundTokenSelector,
    LogitProductScore,
)

from .dino import dino


def focus_detr(
    *,
    channels=256,
    num_heads=8,
    num_points=4,
    num_levels=4,
    hidden_channels=2048,
    keep_ratio=0.5,
    layer_keep_ratios=(1.0, 0.8, 0.6, 0.6, 0.4, 0.2),
    num_object_tokens=300,
    strides=(8, 16, 32, 64),
    range_ends=(64, 128, 256),
    **dino_arguments,
):
    """The whole model, with one encoder layer for each of `layer_keep_ratios`.

    `strides` are pixels a token on each level, `range_ends` the largest distance (in pixels) to a
    side of the box that each level but the last is responsible for.
    """
    model = dino(
        channels=channels,
        num_heads=num_heads,
        num_points=num_points,
        num_levels=num_levels,
        hidden_channels=hidden_channels,
        encoder_layers=0,
        **dino_arguments,
    )
    model.detector.selection = L(ForegroundTokenSelector)(
        score_head=L(ForegroundScoreHead)(channels=channels),
        num_levels=num_levels,
        keep_ratio=keep_ratio,
        layer_keep_ratios=list(layer_keep_ratios),
    )
    model.detector.encoder.layers = [
        L(DualAttentionEncoderLayer)(
            object_attention=L(ObjectSelfAttention)(
                attention=L(SelfAttention)(channels=channels, num_heads=num_heads),
                channels=channels,
                num_tokens=num_object_tokens,
            ),
            attention=L(DeformableEncoderAttention)(
                channels=channels, num_heads=num_heads, num_levels=num_levels, num_points=num_points
            ),
            feedforward=L(FeedForward)(channels=channels, hidden_channels=hidden_channels),
            channels=channels,
        )
        for _ in layer_keep_ratios
    ]
    model.detector.encoder.value_source = L(InitialValues)()
    model.detector.encoder.object_score = L(LogitProductScore)()
    model.losses.append(
        L(ForegroundLoss)(
            labels=L(SideDistanceForeground)(strides=list(strides), ends=list(range_ends))
        )
    )
    return model


model = focus_detr()
