"""What deformable map attention adds to its logits for the positions of query and key."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.deformed_keys import KeyTokens

TABLE_INIT_STD = 0.01
"""Standard deviation of new tables, as in the published code."""


class PositionBias(nn.Module, ABC):
    """The interface of a bias of logits.

    Attributes:
        num_heads: H.
        num_groups: G of the keys that it takes, None for any.
        needs_points: whether keys must have places.
    """

    num_groups: int | None = None
    needs_points = True

    def __init__(self, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    @abstractmethod
    def forward(
        self, keys: KeyTokens, map_shape: tuple[int, int], queries: slice | Tensor
    ) -> Tensor:
        """Bias for some of the queries.

        Args:
            keys: all keys.
            map_shape: (H, W) of the query map.
            queries: which n of the H*W queries, as a slice or (n,) indices.

        Returns:
            (B or 1, H, n, M) to be added to the logits.
        """


def _displacements(keys: KeyTokens, queries: slice | Tensor, scale: float) -> Tensor:
    """(B, G, n, M, 2) of (x, y), query minus key, times `scale`.

    Positive where the query is to the right of the key and below it.
    """
    if keys.points is None or keys.query_points is None:
        raise ValueError("This position bias needs keys that have points.")
    # Scaled before there is one for every pair, which is all that takes memory here.
    query_points, points = keys.query_points * scale, keys.points * scale
    return query_points[queries, None, :] - points[:, :, None]


def _new_table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=TABLE_INIT_STD))


class RelativePositionTable(PositionBias):
    """A table of each head, sampled bilinearly at the displacement of query and key.

    The displacement in normalised coordinates, halved, spans [-1, 1] from edge to edge of the
    table, whose centre is no displacement. So a table serves maps of any size. For a map of the
    size that it was made for its entries are whole cells apart, exactly so in the grid of 2023
    (arXiv 2201.00520, 3.2). Beyond its edges values fall to zero.

    Displacements are a sum of something of the query's row and column and something of the key, so
    that two one-dimensional interpolations, as matrix products, give the same. On a CPU that took
    as long, for 27 and more multiply-adds a value instead of 4.

    Args:
        num_heads: H.
        map_shape: (Hs, Ws) of the map that the table is made for, each at least 1.

    Raises:
        ConfigError: if the map is empty.
    """

    def __init__(self, *, num_heads: int, map_shape: tuple[int, int]) -> None:
        super().__init__(num_heads=num_heads)
        height, width = map_shape
        if min(height, width) < 1:
            raise ConfigError(f"map_shape=({height}, {width}) of RelativePositionTable is empty.")
        self.relative_position_bias_table = _new_table(num_heads, 2 * height - 1, 2 * width - 1)

    def forward(
        self, keys: KeyTokens, map_shape: tuple[int, int], queries: slice | Tensor
    ) -> Tensor:
        """Sample the tables; see `PositionBias.forward`."""
        displacements = _displacements(keys, queries, scale=0.5)
        batch, num_groups, _, num_keys, _ = displacements.shape
        tables = self.relative_position_bias_table.to(displacements.dtype)
        tables = tables.unflatten(0, (num_groups, -1)).expand(batch, -1, -1, -1, -1)
        bias = F.grid_sample(
            tables.flatten(0, 1),
            displacements.flatten(0, 1),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=True,
        )
        return bias.reshape(batch, self.num_heads, -1, num_keys)


class LogPositionNetwork(PositionBias):
    """A small network on the logarithm of the displacement, shared by all groups (2023, `log_cpb`).

    Args:
        num_heads: H, a multiple of G.
        num_groups: G of the keys.

    Raises:
        ConfigError: if H is no multiple of G.
    """

    HIDDEN_CHANNELS = 32
    SCALE = 4.0

    def __init__(self, *, num_heads: int, num_groups: int) -> None:
        super().__init__(num_heads=num_heads)
        if num_groups < 1 or num_heads % num_groups:
            raise ConfigError(
                f"num_heads={num_heads} of LogPositionNetwork must be a multiple of "
                f"num_groups={num_groups}."
            )
        self.num_groups = num_groups
        self.hidden = nn.Linear(2, self.HIDDEN_CHANNELS)
        self.output = nn.Linear(self.HIDDEN_CHANNELS, num_heads // num_groups, bias=False)

    def forward(
        self, keys: KeyTokens, map_shape: tuple[int, int], queries: slice | Tensor
    ) -> Tensor:
        """Run the network; see `PositionBias.forward`."""
        # The published weights take (y, x).
        scaled = _displacements(keys, queries, self.SCALE).flip(-1)
        # Displacements reach 2, so 3 brings the logarithm's 0 to log2(9) near the unit interval.
        logarithms = scaled.sign() * (scaled.abs() + 1).log2() / 3
        bias = self.output(F.relu(self.hidden(logarithms)))
        return bias.movedim(-1, 2).flatten(1, 2)


class FixedPositionTable(PositionBias):
    """A number for every pair of query cell and key of the grid, wherever the key moved.

    For maps of another size the table is resized like an image of queries by keys, as the published
    detection code does (2023, `fixed_pe`); only the rows in use are.

    Args:
        num_heads: H.
        map_shape: (Hs, Ws) of the query map that the table is made for.
        key_shape: (Hks, Wks) of its grid of keys.

    Raises:
        ConfigError: if one of the maps is empty.
    """

    needs_points = False

    def __init__(
        self, *, num_heads: int, map_shape: tuple[int, int], key_shape: tuple[int, int]
    ) -> None:
        super().__init__(num_heads=num_heads)
        if min(*map_shape, *key_shape) < 1:
            raise ConfigError(
                f"map_shape={tuple(map_shape)} and key_shape={tuple(key_shape)} of "
                "FixedPositionTable must not be empty."
            )
        self.position_bias_table = _new_table(num_heads, math.prod(map_shape), math.prod(key_shape))

    def forward(
        self, keys: KeyTokens, map_shape: tuple[int, int], queries: slice | Tensor
    ) -> Tensor:
        """Look the bias up; see `PositionBias.forward`."""
        table: Tensor = self.position_bias_table
        num_queries, num_keys = math.prod(map_shape), math.prod(keys.map_shape)
        rows = torch.arange(num_queries, device=table.device)[queries]
        columns = torch.arange(num_keys, device=table.device)
        table = _interpolated(table, 1, rows, num_queries)
        return _interpolated(table, 2, columns, num_keys)[None]


def _interpolated(table: Tensor, dim: int, indices: Tensor, length: int) -> Tensor:
    """Entries `indices` along one dimension as if it were resized linearly to `length`."""
    stored = table.shape[dim]
    if stored == length:
        return table.index_select(dim, indices)
    # The ends stay the ends (align_corners=True); a single entry takes the first one's place.
    positions = indices * ((stored - 1) / max(length - 1, 1))
    before = positions.long().clamp(max=stored - 1)
    after = (before + 1).clamp(max=stored - 1)
    fraction = (positions - before).to(table.dtype)
    fraction = fraction.reshape([-1 if axis == dim else 1 for axis in range(table.dim())])
    return torch.lerp(
        table.index_select(dim, before),
        table.index_select(dim, after),
        fraction,
    )
