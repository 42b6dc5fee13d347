"""Multi-scale deformable attention (Deformable DETR, section 4.1), for encoder and decoder.

Values of padded tokens are zeroed after their projection, as in the published code: a padded token
contributes nothing, not even the projection's bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.interface import DecoderAttention, EncoderAttention
from efficient_detr.modeling.attention.token_attention import token_attention_map
from efficient_detr.modeling.layers import xavier_linear
from efficient_detr.ops import (
    deformable_sampling_locations,
    fused_multi_scale_deformable_attention,
)
from efficient_detr.structures import FeatureTokens


class MultiScaleDeformableAttention(nn.Module):
    """Sampling and weighting shared by the encoder and the decoder form.

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: H.
        num_levels: L.
        num_points: P, sampling points a level and head.
    """

    def __init__(
        self, *, channels: int, num_heads: int = 8, num_levels: int = 4, num_points: int = 4
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ConfigError(f"channels={channels} is not a multiple of num_heads={num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(channels, samples * 2)
        self.attention_weights = nn.Linear(channels, samples)
        self.value_projection = xavier_linear(channels, channels)
        self.output_projection = xavier_linear(channels, channels)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        """Start with each head looking its own way, point p at p + 1 cells, all weights equal."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (H, 2)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        ring = directions[:, None, None] * steps[:, None]  # (H, 1, P, 2)
        self.sampling_offsets.bias.copy_(ring.expand(-1, self.num_levels, -1, -1).flatten())
        for zeroed in (
            self.sampling_offsets.weight,
            self.attention_weights.weight,
            self.attention_weights.bias,
            self.value_projection.bias,
            self.output_projection.bias,
        ):
            nn.init.zeros_(zeroed)

    def attend(self, query: Tensor, reference: Tensor, memory: FeatureTokens) -> Tensor:
        """Sample the memory around the references.

        Args:
            query: (B, Q, C) with the position already added.
            reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes, scaled by the valid ratios.
            memory: the tokens sampled.

        Returns:
            (B, Q, C).
        """
        value = self.value_projection(memory.features)
        value = value.masked_fill(memory.padding_mask.unsqueeze(-1), 0)
        logits = self.attention_weights(query)
        sampled = fused_multi_scale_deformable_attention(
            value.unflatten(2, (self.num_heads, -1)),  # (B, S, H, D)
            memory.spatial_shapes,
            reference,
            self._offsets(query),
            logits.unflatten(2, (self.num_heads, self.num_levels, self.num_points)),
        )
        return self.output_projection(sampled)

    def sampling_locations(self, query: Tensor, reference: Tensor, memory: FeatureTokens) -> Tensor:
        """(B, Q, H, L, P, 2) sampling points (x, y); arguments as in `attend`.

        Offsets count in cells around a reference point, and in 1/P half-sizes of a reference box.
        """
        return deformable_sampling_locations(reference, self._offsets(query), memory.spatial_shapes)

    def _offsets(self, query: Tensor) -> Tensor:
        grid = (self.num_heads, self.num_levels, self.num_points, 2)
        return self.sampling_offsets(query).unflatten(2, grid)


class DeformableEncoderAttention(MultiScaleDeformableAttention, EncoderAttention):
    """Deformable attention around the centre of each token; see `EncoderAttention`."""

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: FeatureTokens,
        padding_mask: Tensor,
    ) -> Tensor:
        """Attend from tokens (B, N, C) to `memory`; returns (B, N, C)."""
        return self.attend(query + position, reference_points, memory)


class DeformableDecoderAttention(MultiScaleDeformableAttention, DecoderAttention):
    """Deformable attention around the reference point or inside the reference box of each query."""

    needs_references = True

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_boxes: Tensor | None,
        memory: FeatureTokens,
        layer_input: Tensor,
    ) -> Tensor:
        """Attend from queries (B, Q, C) to `memory`; returns (B, Q, C)."""
        return self.attend(query + position, scaled_references(reference_boxes, memory), memory)

    def sampling(
        self,
        query: Tensor,
        position: Tensor,
        reference_boxes: Tensor | None,
        memory: FeatureTokens,
    ) -> tuple[Tensor, Tensor]:
        """Where the queries look, and how much.

        Returns:
            sampling locations (B, Q, H, L, P, 2) as (x, y) and attention weights (B, Q, H, L, P).
        """
        located = query + position
        references = scaled_references(reference_boxes, memory)
        locations = self.sampling_locations(located, references, memory)
        shape = (self.num_heads, self.num_levels * self.num_points)
        weights = self.attention_weights(located).unflatten(-1, shape).softmax(-1)
        return locations, weights.unflatten(-1, (self.num_levels, self.num_points))

    def token_attention(
        self,
        query: Tensor,
        position: Tensor,
        reference_boxes: Tensor | None,
        memory: FeatureTokens,
    ) -> Tensor:
        """(B, S) attention that each token gets, summed over queries and heads, without gradient.

        Computed a second time beside the operator, which keeps its weights to itself.
        """
        with torch.no_grad():
            locations, weights = self.sampling(query, position, reference_boxes, memory)
        return token_attention_map(locations, weights, memory.spatial_shapes).sum(1)


def scaled_references(reference_boxes: Tensor | None, memory: FeatureTokens) -> Tensor:
    """(B, Q, L, 4|2): references (B, Q, 4|2) in the padded frame of each level.

    Raises:
        ConfigError: if there are no references.
    """
    if reference_boxes is None:
        raise ConfigError(
            "DeformableDecoderAttention needs reference boxes or points: use detector.queries that "
            "provide them"
        )
    repeats = reference_boxes.shape[-1] // 2
    ratios = memory.valid_ratios.repeat(1, 1, repeats)  # (B, L, 4|2)
    return reference_boxes[:, :, None] * ratios[:, None]
