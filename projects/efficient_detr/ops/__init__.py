"""Operators behind a stable Python interface; knows torch only."""

from efficient_detr.ops.deformable_attention import (
    fused_multi_scale_deformable_attention,
    multi_scale_deformable_attention,
)
from efficient_detr.ops.deformable_attention_library import export_decompositions
from efficient_detr.ops.deformable_attention_pytorch import deformable_sampling_locations
from efficient_detr.ops.lsh_clustering import (
    ClusterAssignment,
    HashProjections,
    cluster_broadcast,
    cluster_mean,
    cluster_tokens,
    draw_projections,
)

__all__ = [
    "ClusterAssignment",
    "HashProjections",
    "cluster_broadcast",
    "cluster_mean",
    "cluster_tokens",
    "deformable_sampling_locations",
    "draw_projections",
    "export_decompositions",
    "fused_multi_scale_deformable_attention",
    "multi_scale_deformable_attention",
]
