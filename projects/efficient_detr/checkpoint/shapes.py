"""Read the sizes of a model from the shapes of its weights, and bring tensors into other shapes."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt

from torch import Tensor
from torch.nn import functional as F

from efficient_detr.checkpoint.conversion import matches_template
from efficient_detr.checkpoint.layout import Shapes


def count_parts(keys: Iterable[str], start: str) -> int:
    """Number of modules in a list.

    Args:
        keys: names of weights.
        start: what comes before the number of the module, with the dot at its end.
    """
    numbers = {key[len(start) :].partition(".")[0] for key in keys if key.startswith(start)}
    return sum(number.isdigit() for number in numbers)


def count_keys(shapes: Shapes, template: str) -> int:
    """How many weights a template stands for: with one number in it, how many numbers there are."""
    return sum(matches_template(template, key) for key in shapes)


def inside(shapes: Shapes, start: str) -> Shapes:
    """The shapes in a module, by their names in it.

    Args:
        shapes: of the whole.
        start: name of the module, with the dot at its end.
    """
    return {key[len(start) :]: shape for key, shape in shapes.items() if key.startswith(start)}


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
