"""Which places of a map deformable map attention takes as keys: grids, offsets and their limits.

The published code normalises a map's coordinates to [-1, 1] in two ways and limits offsets in
several. Each is a small part here; a `DeformedKeys` takes one grid and one limit:

==================  ===============================  =======================================
published model     grid                             limit by its `offset_range_factor` s
==================  ===============================  =======================================
DAT (2022)          `HalfPixelGrid`                  s > 0 `BoundedOffsets`, s = 0
                                                     `UnboundedOffsets`, s < 0 `SquashedPoints`
DAT++ (2023)        `ExtendedGrid`                   s >= 0 `BoundedOffsets`, s < 0
                                                     `ClampedPoints`
==================  ===============================  =======================================

All points are (x, y), normalised so that -1 and 1 are the centres of the outermost cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_detr.errors import ConfigError

SINGLE_POSITION = 1.0
"""Where the only row (or column) of an `ExtendedGrid` lies if nothing clamps it."""


class KeyTokens(NamedTuple):
    """What the cells of a map attend to.

    Attributes:
        features: (B, M, C) values of the input map at the keys, not projected.
        points: (B, G, M, 2) normalised (x, y) of the keys of each group of channels, float32 at
            least, or None if the keys have no places.
        query_points: (H*W, 2) normalised (x, y) of the map's cells, row by row, in the grid and the
            dtype of `points`; None with them.
        map_shape: (Hk, Wk) with Hk * Wk = M, the keys' order row by row.
    """

    features: Tensor
    points: Tensor | None
    query_points: Tensor | None
    map_shape: tuple[int, int]


class SamplingGrid(ABC):
    """Where undeformed keys and the queries lie along one axis."""

    @abstractmethod
    def key_positions(
        self, length: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(length,) positions of so many keys; infinite where the formula divides by zero."""

    @abstractmethod
    def query_positions(
        self, length: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(length,) positions of so many cells, always finite."""

    @abstractmethod
    def intervals(self, length: int) -> int:
        """What a range factor is divided by for so many keys, at least 1."""


class HalfPixelGrid(SamplingGrid):
    """DAT of 2022: both at 2 (i + 1/2) / n - 1.

    These are the centres of n equal parts of [-1, 1]. Since -1 and 1 are sampled as the centres of
    the outermost cells, undeformed keys lie slightly nearer to the middle than their cells.
    """

    def key_positions(
        self, length: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Centres of `length` equal parts."""
        return (torch.arange(length, dtype=dtype, device=device) + 0.5) * (2 / length) - 1

    def query_positions(
        self, length: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Centres of `length` equal parts."""
        return self.key_positions(length, device, dtype)

    def intervals(self, length: int) -> int:
        """One interval a key."""
        return length


class ExtendedGrid(SamplingGrid):
    """DAT++ of 2023: keys at 2 (i + 1/2) / (n - 1) - 1, queries at 2 i / (n - 1) - 1.

    Keys reach beyond 1, hence the name: six of them go from -0.8 to 1.2. For a single key row the
    published formula is infinite, which `ClampedPoints` makes 1. Where the published code would
    divide by zero or give NaN, this lies at 1 too: a single row of queries, and a single row of
    keys under another limit, whose range then is not divided.
    """

    def key_positions(
        self, length: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Extends beyond 1; infinite for one key."""
        centres = torch.arange(length, dtype=dtype, device=device) + 0.5
        if length == 1:
            return torch.full_like(centres, torch.inf)
        return centres * (2 / (length - 1)) - 1

    def query_positions(
        self, length: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The cells' own centres; 1 for one cell."""
        cells = torch.arange(length, dtype=dtype, device=device)
        if length == 1:
            return torch.full_like(cells, SINGLE_POSITION)
        return cells * (2 / (length - 1)) - 1

    def intervals(self, length: int) -> int:
        """Intervals between the keys."""
        return max(length - 1, 1)


class OffsetLimit(ABC):
    """How offsets move points of a grid."""

    @abstractmethod
    def __call__(self, offsets: Tensor, references: Tensor, intervals: Tensor) -> Tensor:
        """Points of the keys.

        Args:
            offsets: (..., M, 2) float, as the network gives them.
            references: (M, 2) undeformed points, may be infinite.
            intervals: (2,) `SamplingGrid.intervals` of both axes.

        Returns:
            (..., M, 2), finite.
        """


class BoundedOffsets(OffsetLimit):
    """Adds tanh(offset) * range_factor / intervals; the sum may leave the map.

    Args:
        range_factor: s, at least 0. In the 2022 grid the cells of the key map are 2 / Hk apart, so
            that the published 2 lets a key move by one of them.

    Raises:
        ConfigError: if the factor is negative.
    """

    def __init__(self, *, range_factor: float) -> None:
        if range_factor < 0:
            raise ConfigError(
                f"range_factor={range_factor} of BoundedOffsets must not be negative; for offsets "
                "without a range choose UnboundedOffsets, SquashedPoints or ClampedPoints."
            )
        self.range_factor = range_factor

    def __call__(self, offsets: Tensor, references: Tensor, intervals: Tensor) -> Tensor:
        """Add the bounded offsets."""
        return offsets.tanh() * (self.range_factor / intervals) + _finite(references)


class UnboundedOffsets(OffsetLimit):
    """Adds the offsets as they are (DAT of 2022 with range factor 0)."""

    def __call__(self, offsets: Tensor, references: Tensor, intervals: Tensor) -> Tensor:
        """Add the offsets."""
        return offsets + _finite(references)


class SquashedPoints(OffsetLimit):
    """Takes the tanh of moved points, so that none leaves the map (2022, negative factor)."""

    def __call__(self, offsets: Tensor, references: Tensor, intervals: Tensor) -> Tensor:
        """Add and squash."""
        return (offsets + _finite(references)).tanh()


class ClampedPoints(OffsetLimit):
    """Clamps moved points to the map (DAT++ of 2023 with a negative factor, as published)."""

    def __call__(self, offsets: Tensor, references: Tensor, intervals: Tensor) -> Tensor:
        """Add and clamp; an infinite reference gives 1."""
        return (offsets + references).clamp(-1, 1)


def _finite(references: Tensor) -> Tensor:
    return references.nan_to_num(posinf=SINGLE_POSITION)


class MapKeys(nn.Module, ABC):
    """The interface of what chooses the keys of deformable map attention.

    Attributes:
        num_groups: G, groups of channels with points of their own.
        channels: C of the maps that it takes, None for any.
        has_points: whether keys have places, which most position biases need.
    """

    channels: int | None = None
    num_groups: int = 1
    has_points: bool = True

    @abstractmethod
    def forward(self, features: Tensor, query: Tensor) -> KeyTokens:
        """Choose keys.

        Args:
            features: (B, H, W, C) input of the attention.
            query: (B, H, W, C) its projected queries.
        """


class SharedDepthwiseConvolution(nn.Conv2d):
    """A depthwise convolution whose kernels all groups of channels share.

    Works on the whole map: kernels are repeated, the map is not. A map that is smaller than a
    kernel is extended by zeros at its right and bottom, so that at least one output remains.

    Args:
        channels: of one group.
        num_groups: G.
        kernel_size: side in cells.
        stride: cells between outputs.
        padding: cells of zeros on each side.
    """

    def __init__(
        self, *, channels: int, num_groups: int, kernel_size: int, stride: int, padding: int
    ) -> None:
        super().__init__(
            channels, channels, kernel_size, stride=stride, padding=padding, groups=channels
        )
        self.num_groups = num_groups
        self._margin = padding

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, H, W, G * channels) to (B, Hk, Wk, G * channels)."""
        channels_first = features.permute(0, 3, 1, 2)
        missing = [
            max(kernel - int(side) - 2 * self._margin, 0)
            for kernel, side in zip(self.kernel_size, features.shape[1:3], strict=True)
        ]
        if any(missing):
            channels_first = F.pad(channels_first, (0, missing[1], 0, missing[0]))
        moved = F.conv2d(
            channels_first,
            self.weight.repeat(self.num_groups, 1, 1, 1),
            None if self.bias is None else self.bias.repeat(self.num_groups),
            stride=self.stride,
            padding=self.padding,
            groups=self.num_groups * self.in_channels,
        )
        return moved.permute(0, 2, 3, 1)


class OffsetNetwork(nn.Module):
    """Convolution, LayerNorm, GELU and a linear layer, the same for every group of channels.

    So it is in the published code of both years.

    Args:
        channels: of one group.
        num_groups: G.
        kernel_size: side in cells.
        stride: cells between outputs.
        padding: cells of zeros on each side.
    """

    def __init__(
        self, *, channels: int, num_groups: int, kernel_size: int, stride: int, padding: int
    ) -> None:
        super().__init__()
        self.depthwise = SharedDepthwiseConvolution(
            channels=channels,
            num_groups=num_groups,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
        )
        self.norm = nn.LayerNorm(channels)
        self.activation = nn.GELU()
        self.output = nn.Linear(channels, 2, bias=False)
        self.num_groups = num_groups

    def forward(self, query: Tensor) -> Tensor:
        """Offsets of the keys.

        Args:
            query: (B, H, W, C).

        Returns:
            (B, G, Hk, Wk, 2) offsets (x, y). The linear layer's first row is y, as published.
        """
        hidden = self.depthwise(query).unflatten(-1, (self.num_groups, -1))
        offsets = self.output(self.activation(self.norm(hidden)))
        return offsets.permute(0, 3, 1, 2, 4).flip(-1)


class DeformedKeys(MapKeys):
    """Samples the map at a grid of points that a small network moves (arXiv 2201.00520, 3.2).

    Every group of channels has points of its own, in common for all queries. Points are computed in
    float32 at least, whatever the features are.

    Args:
        channels: C of the map.
        num_groups: G, a divisor of C.
        kernel_size: side of the offset network's convolution, in cells.
        stride: cells between keys.
        grid: undeformed places.
        limit: how offsets move them.
        padding: cells of zeros around the map for the convolution; None for kernel_size // 2, and
            for 0 where the kernel equals the stride, as in the code of 2023.

    Raises:
        ConfigError: if C is no multiple of G, or kernel or stride is less than 1.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_groups: int,
        kernel_size: int,
        stride: int,
        grid: SamplingGrid,
        limit: OffsetLimit,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or channels % num_groups:
            raise ConfigError(
                f"channels={channels} of DeformedKeys must be a multiple of "
                f"num_groups={num_groups}."
            )
        if kernel_size < 1 or stride < 1:
            raise ConfigError(
                f"kernel_size={kernel_size} and stride={stride} of DeformedKeys must be at least 1."
            )
        if padding is None:
            padding = 0 if kernel_size == stride else kernel_size // 2
        self.channels = channels
        self.num_groups = num_groups
        self.grid = grid
        self.limit = limit
        self.offset_network = OffsetNetwork(
            channels=channels // num_groups,
            num_groups=num_groups,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
        )

    def forward(self, features: Tensor, query: Tensor) -> KeyTokens:
        """Sample the keys; see `MapKeys.forward`."""
        offsets = self.offset_network(query)
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        height, width = (int(side) for side in offsets.shape[2:4])
        rows, columns = (int(side) for side in features.shape[1:3])
        points = self.limit(
            offsets.flatten(2, 3),
            _mesh(self.grid.key_positions, height, width, offsets),
            offsets.new_tensor([self.grid.intervals(width), self.grid.intervals(height)]),
        )
        return KeyTokens(
            features=sample_map(features, points),
            points=points,
            query_points=_mesh(self.grid.query_positions, rows, columns, offsets),
            map_shape=(height, width),
        )


def _mesh(
    positions: Callable[[int, torch.device, torch.dtype], Tensor],
    height: int,
    width: int,
    like: Tensor,
) -> Tensor:
    """(height * width, 2) points (x, y), row by row, of the dtype and on the device of `like`."""
    y, x = (positions(length, like.device, like.dtype) for length in (height, width))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def sample_map(features: Tensor, points: Tensor) -> Tensor:
    """Sample groups of channels bilinearly, each at its own points.

    Args:
        features: (B, H, W, C) map.
        points: (B, G, M, 2) normalised (x, y), where -1 and 1 are the centres of the outermost
            cells; beyond them values fall to zero within a cell.

    Returns:
        (B, M, C) in the type of the map.
    """
    batch, num_groups, num_keys, _ = points.shape
    channels = features.shape[-1]
    grouped = features.permute(0, 3, 1, 2).to(points.dtype)
    sampled = F.grid_sample(
        grouped.reshape(batch * num_groups, channels // num_groups, *features.shape[1:3]),
        points.reshape(batch * num_groups, num_keys, 1, 2),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )
    return sampled.reshape(batch, channels, num_keys).transpose(1, 2).to(features.dtype)


class PooledKeys(MapKeys):
    """Means over squares of cells as keys, without places (2023 code, `no_off`).

    Rows and columns that fill no square are left out, unless the map is smaller than a square.

    Args:
        kernel_size: side of a square in cells.

    Raises:
        ConfigError: if the side is less than 1.
    """

    has_points = False

    def __init__(self, *, kernel_size: int) -> None:
        super().__init__()
        if kernel_size < 1:
            raise ConfigError(f"kernel_size={kernel_size} of PooledKeys must be at least 1.")
        self.kernel_size = kernel_size

    def forward(self, features: Tensor, query: Tensor) -> KeyTokens:
        """Average the map; see `MapKeys.forward`. Queries play no part."""
        kernel = tuple(min(self.kernel_size, side) for side in features.shape[1:3])
        pooled = F.avg_pool2d(features.permute(0, 3, 1, 2), kernel)
        return KeyTokens(
            features=pooled.flatten(2).transpose(1, 2),
            points=None,
            query_points=None,
            map_shape=(pooled.shape[2], pooled.shape[3]),
        )
