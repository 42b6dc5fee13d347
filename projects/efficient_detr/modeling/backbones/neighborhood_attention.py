"""Neighbourhood attention, which DAT++ has in the place of windows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.map_attention import MapAttention
from efficient_detr.ops.neighborhood_attention import neighborhood_attention


class NeighborhoodAttention(MapAttention):
    """Multi-head attention from every cell to the k * k cells around it (arXiv 2204.07143).

    At the borders the neighbourhood is moved inward, so that every cell sees k * k cells. A map
    with a side shorter than k is padded with zeros at the right and the bottom; the padded cells
    take part.

    Args:
        channels: C.
        num_heads: H; must divide C.
        kernel_size: k, odd.

    Raises:
        ConfigError: if the heads do not divide the channels, or the kernel size is not odd.
    """

    def __init__(self, *, channels: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ConfigError(
                f"num_heads={num_heads} of neighbourhood attention must divide channels={channels}."
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(
                f"kernel_size={kernel_size} of neighbourhood attention must be odd and positive."
            )
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.projection = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)
        side = 2 * kernel_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_heads, side, side))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """Attend; see `MapAttention`."""
        height, width = features.shape[1:3]
        missing_rows = max(0, self.kernel_size - height)
        missing_columns = max(0, self.kernel_size - width)
        padded = F.pad(features, (0, 0, 0, missing_columns, 0, missing_rows))
        heads = self.projection(padded).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.unbind(3)
        table = self.relative_position_bias_table
        attended = neighborhood_attention(query, key, value, table).flatten(3)
        return self.output(attended[:, :height, :width])

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}"
