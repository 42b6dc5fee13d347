"""Arguments, implementations and a literal definition for the tests of deformable attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from efficient_detr.ops import (
    deformable_sampling_locations,
    fused_multi_scale_deformable_attention,
    library,
    multi_scale_deformable_attention,
)
from efficient_detr.ops.deformable_attention_pytorch import (
    sample_by_embedding_bag,
    sample_by_grid_sample,
    softmax_over_points,
)
from efficient_detr.structures import SpatialShapes

ODD_SHAPES: list[SpatialShapes] = [
    [(3, 5)],
    [(5, 7), (3, 4), (2, 2), (1, 1)],
    [(1, 6), (7, 1), (1, 1)],  # levels of one row, of one column, of one token
]


@dataclass(frozen=True)
class Implementation:
    """One way to run both operators; arguments live and results arrive on the CPU."""

    name: str
    device: str

    def plain(self, value: Tensor, shapes: SpatialShapes, *sampling: Tensor) -> Tensor:
        formulations = {
            "grid_sample": sample_by_grid_sample,
            "embedding_bag": sample_by_embedding_bag,
        }
        value, *sampling = (tensor.to(self.device) for tensor in (value, *sampling))
        if self.name in formulations:
            return formulations[self.name](value, shapes, *sampling).cpu()
        return multi_scale_deformable_attention(
            value, shapes, *sampling, implementation=self.name
        ).cpu()

    def fused(self, value: Tensor, shapes: SpatialShapes, *sampling: Tensor) -> Tensor:
        if self.name in ("grid_sample", "embedding_bag"):
            reference, offsets, logits = sampling
            locations = deformable_sampling_locations(reference, offsets, shapes)
            return self.plain(value, shapes, locations, softmax_over_points(logits))
        value, *sampling = (tensor.to(self.device) for tensor in (value, *sampling))
        return fused_multi_scale_deformable_attention(
            value, shapes, *sampling, implementation=self.name
        ).cpu()

    def skip_if_missing(self) -> None:
        if self.name == "compiled":
            problem = library.missing_reason(torch.device(self.device))
            if problem:
                pytest.skip(f"needs the compiled kernels, but {problem}")


def _each(*names: str) -> Iterator[object]:
    for name, device in product(names, ("cpu", "cuda")):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        yield pytest.param(Implementation(name, device), marks=marks, id=f"{name}-{device}")


# The two formulations by themselves need one floating dtype throughout.
FORMULATIONS = list(_each("grid_sample", "embedding_bag", "compiled"))
IMPLEMENTATIONS = list(_each("pytorch", "compiled"))
COMPILED = list(_each("compiled"))


def arguments(
    shapes: SpatialShapes,
    *,
    batch: int = 2,
    queries: int = 5,
    heads: int = 3,
    channels: int = 2,
    points: int = 3,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, SpatialShapes, Tensor, Tensor]:
    """Random arguments of the plain operator; locations reach well outside the levels."""
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, channels, dtype=dtype)
    grid = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*grid, 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(grid, dtype=dtype)
    return value, shapes, locations, weights / weights.sum((-2, -1), keepdim=True)


def fused_arguments(
    plain: tuple[Tensor, SpatialShapes, Tensor, Tensor], *, reference_size: int
) -> tuple[Tensor, SpatialShapes, Tensor, Tensor, Tensor]:
    """Random references, and offsets and logits that give the arguments of the plain operator."""
    value, shapes, locations, weights = plain
    batch, queries, _, levels, points = weights.shape
    reference = torch.rand(batch, queries, levels, reference_size, dtype=locations.dtype)
    around = reference[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 | 4)
    offsets = locations - around[..., :2]
    if reference_size == 2:
        offsets = offsets * torch.tensor(shapes).flip(1)[:, None]
    else:
        reference[..., 2:] += 0.1
        offsets = offsets / around[..., 2:] * 2 * points
    return value, shapes, reference, offsets, weights.log() + 1


def away_from_kinks(locations: Tensor, shapes: SpatialShapes) -> Tensor:
    """Locations at least a tenth of a pixel from where bilinear sampling has a kink."""
    sizes = torch.tensor(shapes).flip(1)[:, None]
    pixels = locations * sizes - 0.5
    pixels = pixels.floor() + 0.1 + 0.8 * (pixels - pixels.floor())
    return (pixels + 0.5) / sizes


def literal(value: Tensor, shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Equation 3 of Deformable DETR with one loop for each of its indices."""
    batch, queries, heads, levels, points = weights.shape
    output = value.new_zeros(batch, queries, heads, value.shape[-1])
    for b, q, h, level, p in torch.cartesian_prod(
        *(torch.arange(n) for n in (batch, queries, heads, levels, points))
    ).tolist():
        height, width = shapes[level]
        start = sum(rows * columns for rows, columns in shapes[:level])
        x = locations[b, q, h, level, p, 0].item() * width - 0.5
        y = locations[b, q, h, level, p, 1].item() * height - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    token = value[b, start + row * width + column, h]
                    output[b, q, h] += weights[b, q, h, level, p] * share * token
    return output.flatten(2)


def gradients(
    function: Callable[..., Tensor], upstream: Tensor, *arguments: object
) -> list[Tensor]:
    """Gradients of all tensors among the arguments."""
    leaves = [
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments
    ]
    output = function(*leaves)
    return list(
        torch.autograd.grad(output, [leaf for leaf in leaves if isinstance(leaf, Tensor)], upstream)
    )
