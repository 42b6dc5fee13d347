"""Attention types. Each is its own class behind one of two interfaces.

    EncoderAttention.forward(query (B,N,C), position (B,N,C), reference_points (B,N,L,2),
                             memory: FeatureTokens) -> (B,N,C)
    DecoderAttention.forward(query (B,Q,C), position (B,Q,C), reference_boxes (B,Q,4),
                             memory: FeatureTokens) -> (B,Q,C)

The output carries neither residual nor norm; the layer adds them.
"""

from efficient_detr.modeling.attention.deformable import (
    DeformableDecoderAttention,
    DeformableEncoderAttention,
)
from efficient_detr.modeling.attention.dense import SelfAttention
from efficient_detr.modeling.attention.interface import DecoderAttention, EncoderAttention
from efficient_detr.modeling.attention.object import ObjectSelfAttention

__all__ = [
    "DecoderAttention",
    "DeformableDecoderAttention",
    "DeformableEncoderAttention",
    "EncoderAttention",
    "ObjectSelfAttention",
    "SelfAttention",
]
