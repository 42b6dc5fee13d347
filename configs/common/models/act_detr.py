"""ACT as a LazyConfig: DETR with clustered attention in the encoder, and with its distillation."""

from detectron2.config import LazyCall as L

from efficient_detr.losses.distillation import BoxDistillationLoss, MeanSquaredError
from efficient_detr.modeling.attention.clustered import (
    MAX_CLUSTER_RATIO,
    MIN_TOKENS,
    ClusteredEncoderAttention,
)
from efficient_detr.modeling.attention.token_clustering import TokenClustering
from efficient_detr.modeling.distillation import DistillationDetector

from .detr import detr


def token_clustering(channels, num_heads, **hashing):
    """Clustering of the tokens of each head, C / H channels wide."""
    return L(TokenClustering)(head_channels=channels // num_heads, **hashing)


def act_detr(
    *,
    rounds=32,
    width=8.0,
    bias_range=1.0,
    redraw=False,
    include_padding=False,
    key_rounds=None,
    min_tokens=MIN_TOKENS,
    max_cluster_ratio=MAX_CLUSTER_RATIO,
    channels=256,
    num_heads=8,
    dropout=0.1,
    **detr_arguments,
):
    """DETR whose encoder layers cluster their queries, and their keys if `key_rounds` is given.

    Every layer has projections of its own: layer i is seeded with 2 i for queries, 2 i + 1 for
    keys.
    """
    model = detr(channels=channels, num_heads=num_heads, dropout=dropout, **detr_arguments)
    hashing = dict(width=width, bias_range=bias_range, redraw=redraw)
    for index, layer in enumerate(model.detector.encoder.layers):
        layer.attention = L(ClusteredEncoderAttention)(
            channels=channels,
            num_heads=num_heads,
            dropout=dropout,
            query_clustering=token_clustering(
                channels,
                num_heads,
                rounds=rounds,
                include_padding=include_padding,
                seed=2 * index,
                **hashing,
            ),
            key_clustering=None
            if key_rounds is None
            else token_clustering(
                channels, num_heads, rounds=key_rounds, seed=2 * index + 1, **hashing
            ),
            min_tokens=min_tokens,
            max_cluster_ratio=max_cluster_ratio,
        )
    return model


def distilled(model, weight=1.0):
    """Teach the clustered attention of a model by dense attention with the same weights (MTKD)."""
    model.detector._target_ = DistillationDetector
    model.losses.append(L(BoxDistillationLoss)(weight=weight, distance=L(MeanSquaredError)()))
    return model


model = act_detr()
