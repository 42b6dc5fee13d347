"""Multi-scale deformable attention: two formulations against a literal one, point by point."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from efficient_detr.ops import multi_scale_deformable_attention
from efficient_detr.ops.deformable_attention import sample_by_embedding_bag, sample_by_grid_sample
from efficient_detr.structures import SpatialShapes

Formulation = Callable[[Tensor, SpatialShapes, Tensor, Tensor], Tensor]

both = pytest.mark.parametrize("formulation", [sample_by_embedding_bag, sample_by_grid_sample])

ODD_SHAPES = [
    [(3, 5)],
    [(5, 7), (3, 4), (2, 2), (1, 1)],
    [(1, 6), (7, 1), (1, 1)],  # levels of one row, of one column, of one token
]


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
    """Random arguments; locations reach well outside the levels."""
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, channels, dtype=dtype)
    grid = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*grid, 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(grid, dtype=dtype)
    return value, shapes, locations, weights / weights.sum((-2, -1), keepdim=True)


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


@both
@pytest.mark.parametrize("shapes", ODD_SHAPES)
def test_equals_the_definition(formulation: Formulation, shapes: SpatialShapes) -> None:
    inputs = arguments(shapes)
    torch.testing.assert_close(formulation(*inputs), literal(*inputs))


@pytest.mark.parametrize("shapes", ODD_SHAPES)
@pytest.mark.parametrize(("queries", "points", "heads"), [(1, 1, 1), (4, 2, 5), (17, 3, 2)])
def test_formulations_agree(shapes: SpatialShapes, queries: int, points: int, heads: int) -> None:
    inputs = arguments(shapes, queries=queries, points=points, heads=heads, channels=3)
    for tensor in (inputs[0], inputs[2], inputs[3]):
        tensor.requires_grad_()
    outputs = [f(*inputs) for f in (sample_by_embedding_bag, sample_by_grid_sample)]
    torch.testing.assert_close(*outputs)
    upstream = torch.randn_like(outputs[0])
    differentiable = [inputs[0], inputs[2], inputs[3]]
    bag, grid = (torch.autograd.grad(output, differentiable, upstream) for output in outputs)
    for ours, theirs in zip(bag, grid, strict=True):
        torch.testing.assert_close(ours, theirs)


@both
def test_hand_derived_samples(formulation: Formulation) -> None:
    """A 2 x 2 map with the values 1 2 / 3 4, centres at 1/4 and 3/4."""
    value = torch.tensor([1.0, 2, 3, 4]).reshape(1, 4, 1, 1)
    points = {
        (0.25, 0.25): 1.0,  # a centre
        (0.75, 0.25): 2.0,  # x runs along the row
        (0.5, 0.5): 2.5,  # the middle of all four
        (0.5, 0.75): 3.5,  # between the two of the lower row
        (0.0, 0.25): 0.5,  # on the border: half the token, half the zeros outside
        (0.0, 0.0): 0.25,  # on the corner
        (1.0, 1.0): 1.0,
        (-0.25, 0.25): 0.0,  # a whole pixel beyond the first centre
        (1.25, 0.75): 0.0,
        (0.75, 1.2): 0.4,  # y = 1.9 pixels: a tenth of the lower row
    }
    locations = torch.tensor(list(points)).reshape(1, -1, 1, 1, 1, 2)
    weights = torch.ones(1, len(points), 1, 1, 1)
    sampled = formulation(value, [(2, 2)], locations, weights).flatten()
    torch.testing.assert_close(sampled, torch.tensor(list(points.values())))


@both
def test_levels_and_weights_add_up(formulation: Formulation) -> None:
    """Level 0 holds 10, level 1 holds 1 (twice); two points a level at the centre."""
    value = torch.tensor([10.0, 1, 1]).reshape(1, 3, 1, 1)
    locations = torch.full((1, 1, 1, 2, 2, 2), 0.5)
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).reshape(1, 1, 1, 2, 2)
    sampled = formulation(value, [(1, 1), (1, 2)], locations, weights)
    assert sampled.item() == pytest.approx(0.3 * 10 + 0.7 * 1)


@both
def test_heads_and_images_stay_apart(formulation: Formulation) -> None:
    value, shapes, locations, weights = arguments([(4, 3), (2, 2)])
    whole = formulation(value, shapes, locations, weights)
    for image in range(2):
        for head in range(3):
            one = formulation(
                value[image : image + 1, :, head : head + 1],
                shapes,
                locations[image : image + 1, :, head : head + 1],
                weights[image : image + 1, :, head : head + 1],
            )
            torch.testing.assert_close(one[0], whole[image, :, 2 * head : 2 * head + 2])


@both
def test_gradients(formulation: Formulation) -> None:
    value, shapes, locations, weights = arguments(
        [(3, 2), (1, 2)], batch=1, queries=2, heads=2, points=2
    )
    # Bilinear sampling has kinks where a coordinate crosses a centre: stay off them.
    sizes = torch.tensor(shapes).flip(1).double()[:, None]
    pixels = locations * sizes - 0.5
    pixels = pixels.floor() + 0.1 + 0.8 * (pixels - pixels.floor())
    locations = (pixels + 0.5) / sizes
    for tensor in (value, locations, weights):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, p, w: formulation(v, shapes, p, w), (value, locations, weights)
    )


@both
def test_no_queries(formulation: Formulation) -> None:
    value, shapes, locations, weights = arguments([(4, 3), (2, 2)], queries=0)
    value.requires_grad_()
    output = formulation(value, shapes, locations, weights)
    assert output.shape == (2, 0, 6)
    output.sum().backward()
    assert value.grad is not None and value.grad.eq(0).all()


@both
def test_non_contiguous_arguments(formulation: Formulation) -> None:
    value, shapes, locations, weights = arguments([(4, 3), (2, 2)])
    expected = formulation(value, shapes, locations, weights)
    transposed = value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    strided = torch.stack([locations, locations], dim=-1)[..., 0]
    reversed_weights = weights.flip(1).contiguous().flip(1)
    assert not transposed.is_contiguous() and not strided.is_contiguous()
    torch.testing.assert_close(formulation(transposed, shapes, strided, reversed_weights), expected)


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_locations_that_are_no_place_contribute_nothing(
    formulation: Formulation, bad: float
) -> None:
    value, shapes, locations, weights = arguments([(4, 3), (2, 2)], dtype=torch.float32)
    without = weights.clone()
    without[:, 1, :, 0, 2] = 0
    expected = formulation(value, shapes, locations, without)
    locations[:, 1, :, 0, 2] = bad
    locations[0, 1, 0, 0, 2, 0] = 0.5  # one coordinate alone is no place either
    for tensor in (value, locations, weights):
        tensor.requires_grad_()
    output = formulation(value, shapes, locations, weights)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    for tensor in (value, locations, weights):
        assert tensor.grad is not None and tensor.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_keep_exact_locations(dtype: torch.dtype) -> None:
    """At most twice the error that rounding the values alone makes, and the values' dtype.

    On a map 200 cells wide, a location rounded to bfloat16 would be off by up to 0.4 cells.
    """
    value, shapes, locations, weights = arguments([(150, 200), (75, 100)], dtype=torch.float64)
    locations = torch.rand_like(locations).float()  # inside the map, exact in float32
    weights = weights.float()
    exact = sample_by_grid_sample(value, shapes, locations.double(), weights.double())
    rounded = value.to(dtype)
    reference = sample_by_grid_sample(
        rounded.double(), shapes, locations.double(), weights.double()
    ).to(dtype)
    output = multi_scale_deformable_attention(rounded, shapes, locations, weights)
    assert output.dtype is dtype
    with_gradient = multi_scale_deformable_attention(
        rounded.requires_grad_(), shapes, locations, weights
    )
    torch.testing.assert_close(with_gradient, output)
    error = (output.double() - exact).abs().max()
    assert error <= 2 * (reference.double() - exact).abs().max()


def test_runs_in_the_better_of_float32_and_the_values_dtype() -> None:
    inputs = arguments([(4, 3)], dtype=torch.float64)
    value, shapes, locations, weights = inputs
    assert multi_scale_deformable_attention(*inputs).dtype is torch.float64
    single = multi_scale_deformable_attention(
        value.float(), shapes, locations.float(), weights.float()
    )
    torch.testing.assert_close(single.double(), literal(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, p, w: (v[:, :-1], p, w), r"15 tokens.*hold 16"),
        (lambda v, p, w: (v, p[:, :-1], w), "sampling_locations and attention_weights must be"),
        (lambda v, p, w: (v, p, w[..., :-1]), "sampling_locations and attention_weights must be"),
        (lambda v, p, w: (v, p[..., :1], w), "sampling_locations and attention_weights must be"),
        (lambda v, p, w: (v[:1], p, w), "B=1"),
        (lambda v, p, w: (v[:, :, :2], p, w), "H=2"),
        (lambda v, p, w: (v, p[:, :, :, :1], w[:, :, :, :1]), "L=2"),
    ],
)
def test_shapes_that_do_not_fit(
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], message: str
) -> None:
    value, shapes, locations, weights = arguments([(4, 3), (2, 2)])
    value, locations, weights = change(value, locations, weights)
    with pytest.raises(ValueError, match=message):
        multi_scale_deformable_attention(value, shapes, locations, weights)
