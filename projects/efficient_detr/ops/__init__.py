"""Operators behind a stable Python interface; knows torch only."""

from efficient_detr.ops.deformable_attention import multi_scale_deformable_attention

__all__ = ["multi_scale_deformable_attention"]
