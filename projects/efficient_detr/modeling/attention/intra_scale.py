"""Encoder attention inside every level by itself: SMCA's intra-scale attention."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_detr.modeling.attention.dense import MultiHeadAttention
from efficient_detr.modeling.attention.interface import EncoderAttention
from efficient_detr.structures import FeatureTokens


class IntraScaleAttention(MultiHeadAttention, EncoderAttention):
    """Every token attends to the unpadded tokens of its own level; one set of weights for all.

    Multi-scale self-attention, over all levels at once, is `DenseEncoderAttention`.
    """

    attends_whole_levels = True

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: FeatureTokens,
        padding_mask: Tensor,
    ) -> Tensor:
        """Attend from all tokens (B, S, C) to `memory`; returns (B, S, C)."""
        key = memory.features + memory.positions
        projected = self.project(query + position, key, memory.features)
        levels = [heads.split(memory.level_sizes, dim=2) for heads in projected]
        visible = [~mask[:, None, None] for mask in memory.split(memory.padding_mask)]
        attended = [
            self.attend_heads(queries, keys, values, mask)
            for queries, keys, values, mask in zip(*levels, visible, strict=True)
        ]
        return self.merge(torch.cat(attended, dim=2))
