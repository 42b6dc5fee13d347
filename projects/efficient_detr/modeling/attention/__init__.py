"""Attention types. Each is its own class behind one of two interfaces.

    EncoderAttention.forward(query (B,N,C), position (B,N,C), reference_points (B,N,L,2),
                             memory: FeatureTokens, padding_mask (B,N)) -> (B,N,C)
    DecoderAttention.forward(query (B,Q,C), position (B,Q,C), reference_boxes (B,Q,2|4) | None,
                             memory: FeatureTokens, layer_input (B,Q,C)) -> (B,Q,C)

The output carries neither residual nor norm; the layer adds them.
"""

from efficient_detr.modeling.attention.clustered import (
    ClusteredEncoderAttention,
    ClusteredSelfAttention,
)
from efficient_detr.modeling.attention.deformable import (
    DeformableDecoderAttention,
    DeformableEncoderAttention,
)
from efficient_detr.modeling.attention.dense import (
    DenseDecoderAttention,
    DenseEncoderAttention,
    SelfAttention,
)
from efficient_detr.modeling.attention.interface import DecoderAttention, EncoderAttention
from efficient_detr.modeling.attention.intra_scale import IntraScaleAttention
from efficient_detr.modeling.attention.object import ObjectSelfAttention
from efficient_detr.modeling.attention.spatially_modulated import (
    ScaleSelectiveModulatedAttention,
    SpatiallyModulatedAttention,
)
from efficient_detr.modeling.attention.token_clustering import TokenClustering

__all__ = [
    "ClusteredEncoderAttention",
    "ClusteredSelfAttention",
    "DecoderAttention",
    "DeformableDecoderAttention",
    "DeformableEncoderAttention",
    "DenseDecoderAttention",
    "DenseEncoderAttention",
    "EncoderAttention",
    "IntraScaleAttention",
    "ObjectSelfAttention",
    "ScaleSelectiveModulatedAttention",
    "SelfAttention",
    "SpatiallyModulatedAttention",
    "TokenClustering",
]
