"""Attention of a map's cells to a set of keys that deformed points sample (DAT and DAT++).

It shares no more than the name with multi-scale deformable attention: there every query samples a
few points of its own, here all queries attend to the same sampled keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.deformed_keys import KeyTokens, MapKeys
from efficient_detr.modeling.backbones.map_attention import MapAttention
from efficient_detr.modeling.backbones.position_bias import PositionBias

MAX_LOGITS = 2**25
"""Logits of one chunk of queries: images x heads x queries x keys."""


class DeformableMapAttention(MapAttention):
    """Multi-head attention of all cells to keys that are sampled from the same map.

    With as many keys as the published models take, logits are too many to be held at once: for an
    image of 800x1280 pixels, 12 x 4000 x 4000 in stage 2 of DAT-T and 2 x 64000 x 1000 in stage 0
    of DAT++-T. So queries are taken in chunks of at most `max_logits` logits, but one query at
    least. Chunks change results by no more than rounding. In training, if there are several, each
    is computed again in the backward pass.

    A chunk of N logits takes 4 N (1 + 2 G / H) bytes in inference, for biases and displacements:
    with the default N 201 MB in stage 2 of DAT-T and 268 MB in stage 0 of DAT++-T (230 and 296 MB
    measured on a CPU, everything else included), where the whole would take 1.15 and 1.02 GB. In
    training their gradients and, where no fused kernel applies, the attention weights come on top:
    about 24 N bytes, 0.8 GB, for both.

    Args:
        channels: C, a multiple of H.
        num_heads: H, a multiple of the keys' number of groups G; head h sees the points of group
            h * G // H.
        keys: chooses and samples the keys.
        position_bias: bias of the logits; None for none.
        query_convolution: module on the projected queries (B, H, W, C) whose result is added to
            what the heads give; None for none.
        max_logits: N above.

    Raises:
        ConfigError: if these numbers do not fit one another.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int,
        keys: MapKeys,
        position_bias: PositionBias | None = None,
        query_convolution: nn.Module | None = None,
        max_logits: int = MAX_LOGITS,
    ) -> None:
        super().__init__()
        _check(channels, num_heads, keys, position_bias)
        if max_logits < 1:
            raise ConfigError(
                f"max_logits={max_logits} of DeformableMapAttention must be at least 1."
            )
        self.num_heads = num_heads
        self.keys = keys
        self.position_bias = position_bias
        self.query_convolution = query_convolution
        self.max_logits = max_logits
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Attend; see `MapAttention.forward`."""
        query = self.query(features)
        tokens = self.keys(features, query)
        key, value = (
            self._heads(self.key(tokens.features)),
            self._heads(self.value(tokens.features)),
        )
        attended = self._attend(query, key, value, tokens)
        if self.query_convolution is not None:
            attended = attended + self.query_convolution(query)
        return self.output(attended)

    def attention_weights(
        self, features: Tensor, query_indices: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """How much some cells attend to each key, for pictures.

        Args:
            features: (B, H, W, C) as in `forward`.
            query_indices: (n,) indices into the cells, row by row.

        Returns:
            (B, H, n, M) weights that sum to 1 over the keys, and the keys' points (B, G, M, 2) as
            normalised (x, y), None if they have no places.
        """
        query = self.query(features)
        tokens = self.keys(features, query)
        selected = self._heads(query.flatten(1, 2)[:, query_indices])
        key = self._heads(self.key(tokens.features))
        logits = (selected * selected.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        bias = self._bias(tokens, _map_shape(query), query_indices)
        if bias is not None:
            logits = logits + bias
        return logits.softmax(dim=-1), tokens.points

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, tokens: KeyTokens) -> Tensor:
        """(B, H, W, C) of the heads, chunk by chunk."""
        map_shape = _map_shape(query)
        heads = self._heads(query.flatten(1, 2))
        # Sizes are traced as tensors, from which a loop cannot be written.
        batch, _, num_queries, _ = (int(size) for size in heads.shape)
        length = max(self.max_logits // (batch * self.num_heads * int(key.shape[2])), 1)
        recompute = length < num_queries and torch.is_grad_enabled()
        chunks = []
        for start in range(0, num_queries, length):
            queries = slice(start, start + length)
            arguments = (heads[:, :, queries], key, value, tokens, map_shape, queries)
            if recompute:
                # Nothing in a chunk is random, so there is no state of generators to keep.
                attended = checkpoint(
                    self._attend_chunk, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                attended = self._attend_chunk(*arguments)
            chunks.append(attended)
        return torch.cat(chunks, dim=2).transpose(1, 2).reshape(query.shape)

    def _attend_chunk(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: KeyTokens,
        map_shape: tuple[int, int],
        queries: slice,
    ) -> Tensor:
        """(B, H, n, D) of the heads for (B, H, n, D) queries."""
        bias = self._bias(tokens, map_shape, queries)
        # Fused CUDA kernels take no mask of another type than the queries'.
        mask = None if bias is None else bias.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, mask)

    def _bias(
        self, tokens: KeyTokens, map_shape: tuple[int, int], queries: slice | Tensor
    ) -> Tensor | None:
        if self.position_bias is None:
            return None
        bias: Tensor = self.position_bias(tokens, map_shape, queries)
        return bias

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B, L, C) to (B, H, L, D)."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _map_shape(features: Tensor) -> tuple[int, int]:
    return int(features.shape[1]), int(features.shape[2])


def _check(
    channels: int, num_heads: int, keys: MapKeys, position_bias: PositionBias | None
) -> None:
    """Refuse parts that do not fit one another."""
    if num_heads < 1 or channels % num_heads:
        raise ConfigError(
            f"channels={channels} of DeformableMapAttention must be a multiple of "
            f"num_heads={num_heads}."
        )
    if num_heads % keys.num_groups:
        raise ConfigError(
            f"num_heads={num_heads} of DeformableMapAttention must be a multiple of "
            f"num_groups={keys.num_groups} of its keys."
        )
    if keys.channels not in (None, channels):
        raise ConfigError(
            f"DeformableMapAttention has channels={channels}, but its keys "
            f"channels={keys.channels}."
        )
    if position_bias is None:
        return
    if position_bias.num_heads != num_heads:
        raise ConfigError(
            f"DeformableMapAttention has num_heads={num_heads}, but its position bias "
            f"num_heads={position_bias.num_heads}."
        )
    if position_bias.num_groups not in (None, keys.num_groups):
        raise ConfigError(
            f"The keys of DeformableMapAttention have num_groups={keys.num_groups}, but its "
            f"position bias num_groups={position_bias.num_groups}."
        )
    if position_bias.needs_points and not keys.has_points:
        raise ConfigError(
            f"{type(position_bias).__name__} needs the places of keys, which "
            f"{type(keys).__name__} do not have: leave position_bias out."
        )
