"""Bring tensors of a checkpoint into the shapes of a model."""

from __future__ import annotations

from math import isqrt

from torch import Tensor
from torch.nn import functional as F


def without_kernel(weight: Tensor) -> Tensor:
    """The weight of a linear layer that does what a 1x1 convolution does.

    Args:
        weight: (C_out, C_in, 1, 1).

    Returns:
        (C_out, C_in).
    """
    return weight.flatten(1)


def is_pointwise(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a shape is that of a 1x1 convolution and the other that of its linear layer."""
    return len(before) == 4 and before == (*after, 1, 1)


def resized_position_table(table: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Interpolate a table of relative positions as the authors of DAT and Swin do: bicubically.

    Args:
        table: (H, rows, columns), or flattened with the heads last, (side * side, H).
        shape: that of the result, of the same form and with as many heads.

    Returns:
        The table of that shape; None if no such tables have these two shapes.
    """
    if table.dim() == 3 and len(shape) == 3 and len(table) == shape[0]:
        return _bicubic(table, shape[1], shape[2])
    if table.dim() == 2 and len(shape) == 2 and table.shape[1] == shape[1]:
        before, after = isqrt(len(table)), isqrt(shape[0])
        if before**2 == len(table) and after**2 == shape[0]:
            square = table.T.reshape(-1, before, before)
            return _bicubic(square, after, after).flatten(1).T.contiguous()
    return None


def _bicubic(table: Tensor, height: int, width: int) -> Tensor:
    """Resize (H, rows, columns); the corners' outer edges stay where they are."""
    resized = F.interpolate(
        table[None].float(), (height, width), mode="bicubic", align_corners=False
    )
    return resized[0].to(table.dtype)
