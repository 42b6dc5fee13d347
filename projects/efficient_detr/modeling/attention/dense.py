"""Dense multi-head attention with positions on queries and keys (DETR, appendix A.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.interface import DecoderAttention, EncoderAttention
from efficient_detr.structures import FeatureTokens


class MultiHeadAttention(nn.Module):
    """Projections to heads and back, and dense attention between; the other types build on it.

    The parameters are named and initialised as those of `torch.nn.MultiheadAttention`: one packed
    Xavier-uniform matrix for queries, keys and values.

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: H.
        dropout: probability on the attention weights.
    """

    def __init__(self, *, channels: int, num_heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        if channels % num_heads:
            raise ConfigError(f"channels={channels} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project features (B, N, C) and (B, S, C) to heads (B, H, N, D) and (B, H, S, D)."""
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        projected = (
            F.linear(features, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for features, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        heads_of_query, heads_of_key, heads_of_value = projected
        return heads_of_query, heads_of_key, heads_of_value

    def attend_heads(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Softmax attention of heads.

        Args:
            query: (B, H, N, D), unscaled.
            key: (B, H, S, D).
            value: (B, H, S, D).
            mask: broadcast to (B, H, N, S): bool, True where a query may look; or a float bias.

        Returns:
            (B, H, N, D).
        """
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)

    def merge(self, heads: Tensor) -> Tensor:
        """Concatenate heads (B, H, N, D) and project them to (B, N, C)."""
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attention of features (B, N, C) to (B, S, C); `mask` as in `attend_heads`."""
        return self.merge(self.attend_heads(*self.project(query, key, value), mask))


class SelfAttention(MultiHeadAttention):
    """Every query attends to every query; positions are added to queries and keys, not to values.

    Args: as of `MultiHeadAttention`.
    """

    def forward(
        self, query: Tensor, position: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C) features.
            position: (B, Q, C) position embeddings.
            attention_mask: (Q, Q) bool, True where row may not look at column, or None.

        Returns:
            (B, Q, C) without the residual.
        """
        located = query + position
        mask = None if attention_mask is None else ~attention_mask
        return self.attend(located, located, query, mask)


class DenseEncoderAttention(MultiHeadAttention, EncoderAttention):
    """Every token attends to every unpadded token of all levels; see `EncoderAttention`."""

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: FeatureTokens,
        padding_mask: Tensor,
    ) -> Tensor:
        """Attend from tokens (B, N, C) to `memory`; returns (B, N, C)."""
        return attend_memory(self, query + position, memory)


class DenseDecoderAttention(MultiHeadAttention, DecoderAttention):
    """Every query attends to every unpadded token of all levels; see `DecoderAttention`."""

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_boxes: Tensor | None,
        memory: FeatureTokens,
        layer_input: Tensor,
    ) -> Tensor:
        """Attend from queries (B, Q, C) to `memory`; returns (B, Q, C)."""
        return attend_memory(self, query + position, memory)


def attend_memory(attention: MultiHeadAttention, query: Tensor, memory: FeatureTokens) -> Tensor:
    """Dense attention of `query` (B, N, C), positions included, to the unpadded tokens."""
    key = memory.features + memory.positions
    visible = ~memory.padding_mask[:, None, None]  # (B, 1, 1, S)
    return attention.attend(query, key, memory.features, visible)
