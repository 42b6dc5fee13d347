"""Attention inside windows of a map, as in the 2022 models of DAT.

The scheme is that of Swin (arXiv 2103.14030, section 3.2) with other conventions at two points:
windows are shifted by half their side rounded up, and shifted windows stay shifted on a map of one
window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.map_attention import MapAttention

_SEPARATION = -100.0  # added to the logits of cells that are no neighbours before the shift


class WindowAttention(MapAttention):
    """Multi-head attention inside windows that tile the map.

    A map whose sides are no multiples of the window is padded with zeros at the right and the
    bottom; the padded cells take part.

    Args:
        channels: C.
        num_heads: H; must divide C.
        window: side of a window, in cells.

    Raises:
        ConfigError: if the heads do not divide the channels, or the window has no cell.
    """

    def __init__(self, *, channels: int, num_heads: int, window: int) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ConfigError(
                f"num_heads={num_heads} of window attention must divide channels={channels}."
            )
        if window < 1:
            raise ConfigError(f"window={window} of window attention must be at least 1.")
        self.num_heads = num_heads
        self.window = window
        self.projection = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window - 1) ** 2, num_heads)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """Attend; see `MapAttention`."""
        height, width = features.shape[1:3]
        padding = (0, 0, 0, -width % self.window, 0, -height % self.window)
        attended = self._attend(F.pad(features, padding))
        return attended[:, :height, :width]

    def _attend(self, features: Tensor) -> Tensor:
        """Attend in a map (B, H, W, C) of whole windows."""
        return self._attend_in_windows(features, self._position_bias()[None])

    def _attend_in_windows(self, features: Tensor, bias: Tensor) -> Tensor:
        """Attend in a map of whole windows.

        Args:
            features: (B, H, W, C).
            bias: added to the logits, (1 or windows of all images, heads, cells, cells).
        """
        # Images and windows in one dimension: fused kernels take no more than four.
        tokens = _windows(self.projection(features), self.window).flatten(0, 1)
        query, key, value = tokens.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias
        )
        attended = attended.transpose(1, 2).flatten(2).unflatten(0, (len(features), -1))
        return self.output(_map(attended, self.window, features.shape[1], features.shape[2]))

    def _position_bias(self) -> Tensor:
        """Learned bias of each pair of cells of a window, (heads, cells, cells)."""
        # Few and small operations; an index kept as a buffer would be empty after `to_empty`.
        table = self.relative_position_bias_table
        places = torch.arange(self.window, device=table.device)
        distances = places[:, None] - places + self.window - 1  # query minus key, from 0
        index = distances[:, None, :, None] * (2 * self.window - 1) + distances[None, :, None, :]
        return table[index.reshape(self.window**2, -1)].permute(2, 0, 1)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"num_heads={self.num_heads}, window={self.window}"


class ShiftedWindowAttention(WindowAttention):
    """Attention in windows that lie half a window, rounded up, further to the right and bottom.

    The map is rolled, so that the last windows hold cells from opposite borders; such cells are
    kept apart by 100 less in their logits. Arguments are those of `WindowAttention`.
    """

    def _attend(self, features: Tensor) -> Tensor:
        """Attend in a map (B, H, W, C) of whole windows."""
        shift = (self.window + 1) // 2
        rolled = torch.roll(features, (-shift, -shift), (1, 2))
        bias = self._position_bias() + self._separation(rolled, shift)[:, None]
        bias = bias.expand(len(rolled), *bias.shape).flatten(0, 1)
        return torch.roll(self._attend_in_windows(rolled, bias), (shift, shift), (1, 2))

    def _separation(self, rolled: Tensor, shift: int) -> Tensor:
        """Added to the logits of each pair of cells of a window, (windows, cells, cells)."""
        height, width = rolled.shape[1:3]
        rows, columns = (_regions(size, self.window, shift, rolled) for size in (height, width))
        regions = (3 * rows[:, None] + columns)[None, :, :, None]
        regions = _windows(regions, self.window)[0, :, :, 0]
        apart = regions[:, :, None] != regions[:, None, :]
        return rolled.new_zeros(apart.shape).masked_fill(apart, _SEPARATION)


def _regions(size: int, window: int, shift: int, rolled: Tensor) -> Tensor:
    """Region of each place along a rolled side, (size,): 0 for whole windows, 1 and 2 for the last.

    The last window is cut where its cells were at the opposite border before.
    """
    places = torch.arange(size, device=rolled.device)
    return (places >= size - window).long() + (places >= size - shift).long()


def _windows(features: Tensor, window: int) -> Tensor:
    """Cut a map (B, H, W, C) into (B, windows, cells, C), both row by row."""
    tiles = features.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _map(tokens: Tensor, window: int, height: int, width: int) -> Tensor:
    """Inverse of `_windows`."""
    tiles = tokens.unflatten(1, (height // window, width // window))
    return tiles.unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
