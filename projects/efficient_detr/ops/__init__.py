"""Operators behind a stable Python interface; knows torch only."""

from efficient_detr.ops.deformable_attention import (
    fused_multi_scale_deformable_attention,
    multi_scale_deformable_attention,
)
from efficient_detr.ops.deformable_attention_library import export_decompositions
from efficient_detr.ops.deformable_attention_pytorch import deformable_sampling_locations

__all__ = [
    "deformable_sampling_locations",
    "export_decompositions",
    "fused_multi_scale_deformable_attention",
    "multi_scale_deformable_attention",
]
