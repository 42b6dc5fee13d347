"""Inputs of multi-scale deformable attention, and what one call on them is.

8 heads of 32 channels and 4 points a level, as in Deformable DETR. Shape letters as in
`efficient_detr.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from kernel_benchmark.case import byte_count, to_device
from kernel_benchmark.formulations import SpatialShapes
from torch import Tensor

from efficient_detr.ops import deformable_sampling_locations
from efficient_detr.ops.deformable_attention_pytorch import softmax_over_points

Function = Callable[..., Tensor]

HEADS, POINTS, CHANNELS = 8, 4, 32

# Bilinear interpolation has a kink where a coordinate crosses a pixel's centre. There float32 and
# float64 may fall on different sides, with different gradients that are both right.
_DISTANCE_FROM_KINKS = 1e-3

_CHECKED_QUERIES = 512


@dataclass(frozen=True)
class Sizes:
    """Of a case.

    Attributes:
        levels: (H_l, W_l) of each.
        batch: B.
        queries: Q of a decoder; None for an encoder, where each token is a query.
        random: whether locations are uniform instead of around the query.
    """

    levels: SpatialShapes
    batch: int
    queries: int | None
    random: bool = False


@dataclass(frozen=True)
class Workload:
    """Tensors to call a formulation with.

    Attributes:
        shapes: (H_l, W_l) of each level.
        inputs: `value`, then what the plain or the fused operator takes after the shapes.
        upstream: (B, Q, H * D) gradient of the result.
        checked: indices of the queries whose results are compared with float64.
        differentiable: indices of the inputs that get gradients when training.
        training: whether the backward is part of the work.
        touched: share of the rows of `value` that are sampled at all.
    """

    shapes: SpatialShapes
    inputs: tuple[Tensor, ...]
    upstream: Tensor
    checked: Tensor
    differentiable: tuple[int, ...]
    training: bool
    touched: float

    def with_leaves(self) -> Workload:
        """The same with inputs that collect gradients where they should."""
        inputs = tuple(
            tensor.detach().requires_grad_(self.training and index in self.differentiable)
            for index, tensor in enumerate(self.inputs)
        )
        return replace(self, inputs=inputs)

    def converted(self, value_dtype: torch.dtype, other_dtype: torch.dtype) -> Workload:
        """The same numbers in other dtypes; the gradient has the dtype of the value."""
        value, *others = (tensor.detach() for tensor in self.inputs)
        inputs = (value.to(value_dtype), *(tensor.to(other_dtype) for tensor in others))
        return replace(self, inputs=inputs, upstream=self.upstream.to(value_dtype)).with_leaves()

    def run(self, function: Function) -> object:
        """The work, once."""
        with torch.set_grad_enabled(self.training):
            output = function(self.inputs[0], self.shapes, *self.inputs[1:])
        if not self.training:
            return output
        return torch.autograd.grad(output, self._leaves(), self.upstream)

    def result(self, function: Function) -> list[Tensor]:
        """Output and gradients of the checked queries, computed among all queries.

        The upstream gradient of the others is zero, so that the gradient of `value` depends on the
        checked ones only.
        """
        with torch.set_grad_enabled(self.training):
            output = function(self.inputs[0], self.shapes, *self.inputs[1:])[:, self.checked]
        if not self.training:
            return [output]
        gradients = torch.autograd.grad(output, self._leaves(), self.upstream[:, self.checked])
        return [output.detach(), gradients[0], *(g[:, self.checked] for g in gradients[1:])]

    def exact(self, function: Function) -> list[Tensor]:
        """What `result` should be: in float64, with the checked queries alone."""
        value, *others = self.inputs
        inputs = (value, *(tensor[:, self.checked] for tensor in others))
        checked = torch.arange(len(self.checked), device=value.device)
        alone = replace(
            self, inputs=inputs, upstream=self.upstream[:, self.checked], checked=checked
        )
        return alone.converted(torch.float64, torch.float64).result(function)

    def compulsory_bytes(self) -> int:
        """Each input read once and each output written once, forward and, if so, backward.

        Rows of the value that no point touches need not be read, but their gradient is written.
        """
        value, *others = self.inputs
        read = round(self.touched * byte_count(value)) + byte_count(*others)
        total = read + byte_count(self.upstream)
        if self.training:
            gradients = byte_count(*(self.inputs[index] for index in self.differentiable))
            total += read + byte_count(self.upstream) + gradients
        return total

    def _leaves(self) -> list[Tensor]:
        return [self.inputs[index] for index in self.differentiable]


def make_workload(
    sizes: Sizes, device: torch.device, *, fused: bool, training: bool, dtype: torch.dtype
) -> Workload:
    """Draws inputs, the same in every run.

    Encoder queries sit at their own pixels, with the initial offsets of Deformable DETR, rings of
    radius 1 to P pixels, plus normal noise of 2 pixels. Decoder queries are boxes of 5 to 40 % of
    the image with the same offsets in units of 1/P of half their size, as in DINO.

    Args:
        sizes: of the case.
        device: where the tensors go.
        fused: whether the inputs are those of the fused operator.
        training: whether the backward is part of the work.
        dtype: of `value` and of the upstream gradient; everything else is float32.
    """
    generator = torch.Generator().manual_seed(0)
    reference = _reference(sizes, generator)
    queries = reference.shape[1]
    grid = (sizes.batch, queries, HEADS, len(sizes.levels), POINTS)
    if sizes.random:
        locations = torch.rand(*grid, 2, generator=generator)
    else:
        offsets = _ring_offsets() + 2 * torch.randn(*grid, 2, generator=generator)
        locations = deformable_sampling_locations(reference, offsets, sizes.levels)
    locations = _away_from_kinks(locations, sizes.levels)
    logits = torch.randn(grid, generator=generator)
    tokens = sum(height * width for height, width in sizes.levels)
    value = torch.randn(sizes.batch, tokens, HEADS, CHANNELS, generator=generator)
    upstream = torch.randn(sizes.batch, queries, HEADS * CHANNELS, generator=generator)
    if fused:
        offsets = _offsets_of(locations, reference, sizes.levels)
        inputs: tuple[Tensor, ...] = (value.to(dtype), reference, offsets, logits)
    else:
        inputs = (value.to(dtype), locations, softmax_over_points(logits))
    *inputs_there, upstream = to_device(device, *inputs, upstream.to(dtype))
    workload = Workload(
        shapes=sizes.levels,
        inputs=tuple(inputs_there),
        upstream=upstream,
        checked=torch.randperm(queries, generator=generator)[:_CHECKED_QUERIES].to(device),
        differentiable=(0, 2, 3) if fused else (0, 1, 2),
        training=training,
        touched=_touched_share(locations, sizes.levels) if queries < tokens else 1.0,
    )
    return workload.with_leaves()


def _reference(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(B, Q, L, 2) centres of the tokens, or (B, Q, L, 4) boxes of decoder queries."""
    levels = len(sizes.levels)
    if sizes.queries is not None:
        centres = 0.2 + 0.6 * torch.rand(sizes.batch, sizes.queries, 2, generator=generator)
        extents = 0.05 + 0.35 * torch.rand(sizes.batch, sizes.queries, 2, generator=generator)
        boxes = torch.cat([centres, extents], dim=-1)
        return boxes.unsqueeze(2).repeat(1, 1, levels, 1)
    centres = torch.cat(
        [
            torch.cartesian_prod(
                (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
            ).flip(1)
            for height, width in sizes.levels
        ]
    )
    return centres[None, :, None].repeat(sizes.batch, 1, levels, 1)


def _ring_offsets() -> Tensor:
    """(H, 1, P, 2): head h points in its own direction, point p is p + 1 pixels away."""
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    return directions[:, None, None] * torch.arange(1, POINTS + 1)[:, None]


def _cells(levels: SpatialShapes) -> Tensor:
    """(L, 1, 2) sizes (W_l, H_l)."""
    return torch.tensor(levels, dtype=torch.float32).flip(1)[:, None]


def _away_from_kinks(locations: Tensor, levels: SpatialShapes) -> Tensor:
    pixels = locations * _cells(levels) - 0.5
    low = pixels.floor()
    fraction = (pixels - low).clamp(_DISTANCE_FROM_KINKS, 1 - _DISTANCE_FROM_KINKS)
    return (low + fraction + 0.5) / _cells(levels)


def _offsets_of(locations: Tensor, reference: Tensor, levels: SpatialShapes) -> Tensor:
    """The inverse of `deformable_sampling_locations`."""
    reference = reference[:, :, None, :, None]
    distance = locations - reference[..., :2]
    if reference.shape[-1] == 2:
        return distance * _cells(levels)
    return distance / (reference[..., 2:] * 0.5) * locations.shape[-2]


def _touched_share(locations: Tensor, levels: SpatialShapes) -> float:
    """Share of the (token, head) rows of all images that are a corner of some point."""
    batch, _, heads = locations.shape[:3]
    touched = 0
    for level, (height, width) in enumerate(levels):
        # A border of one pixel takes what lies outside.
        seen = torch.zeros(batch, heads, height + 2, width + 2, dtype=torch.bool)
        pixels = (locations[:, :, :, level] * _cells(levels)[level] - 0.5).floor().long()
        x, y = (pixels + 1).transpose(1, 2).flatten(2, 3).unbind(-1)  # (B, H, QP)
        image, head = (torch.arange(n) for n in (batch, heads))
        for corner_x, corner_y in ((x, y), (x + 1, y), (x, y + 1), (x + 1, y + 1)):
            column, row = corner_x.clamp(0, width + 1), corner_y.clamp(0, height + 1)
            seen[image[:, None, None], head[:, None], row, column] = True
        touched += int(seen[:, :, 1:-1, 1:-1].sum())
    return touched / (batch * heads * sum(height * width for height, width in levels))
