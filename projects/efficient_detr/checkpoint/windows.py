"""Constants of window attention, which the published code stores with its weights."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from efficient_detr.checkpoint.conversion import Drop

COMPUTED = "constants that the model computes"
"""Why these are not read."""


def window_side(table_rows: int) -> int:
    """Cells of a window's side, by the number of displacements in its position table."""
    return (isqrt(table_rows) + 1) // 2


def relative_position_index(window: int) -> Tensor:
    """Rows of a position table for every pair of cells in a window.

    Args:
        window: cells of its side.

    Returns:
        (window ** 2, window ** 2) int64 for query and key, both row by row.
    """
    side = torch.arange(window)
    cells = torch.cartesian_prod(side, side) if window > 1 else torch.zeros(1, 2, dtype=torch.int64)
    distances = cells[:, None] - cells + window - 1  # query minus key, from 0
    return distances[..., 0] * (2 * window - 1) + distances[..., 1]


def shifted_window_mask(map_side: int, window: int, shift: int) -> Tensor:
    """What is added to the logits of two cells that shifting brought into one window.

    Args:
        map_side: cells of the side of a square map, a multiple of `window`.
        window: cells of the side of a window.
        shift: cells by which the map was rolled.

    Returns:
        (windows, window ** 2, window ** 2): 0 for cells of one region, -100 for others.
    """
    strip = torch.zeros(map_side)
    strip[-window:] = 1
    strip[-shift:] = 2
    regions = 3 * strip[:, None] + strip
    tiles = regions.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2)
    cells = tiles.flatten(0, 1).flatten(1)
    return -100.0 * (cells[:, :, None] != cells[:, None, :]).float()


def written_constant(theirs: str, value: Tensor) -> Drop:
    """The row that writes a constant, and does not read it.

    Args:
        theirs: the key.
        value: what is written.
    """
    return Drop(theirs, COMPUTED, lambda shapes: value)
