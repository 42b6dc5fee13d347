"""Sampled keys: positions, limits and the offset network against numbers derived by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.deformed_keys import (
    BoundedOffsets,
    ClampedPoints,
    DeformedKeys,
    ExtendedGrid,
    HalfPixelGrid,
    OffsetLimit,
    PooledKeys,
    SamplingGrid,
    SquashedPoints,
    UnboundedOffsets,
    sample_map,
)

CPU = torch.device("cpu")
LIMITS = [
    BoundedOffsets(range_factor=2.0),
    BoundedOffsets(range_factor=0.0),
    UnboundedOffsets(),
    SquashedPoints(),
    ClampedPoints(),
]


def keys(**changes: Any) -> DeformedKeys:
    torch.manual_seed(0)
    arguments: dict[str, Any] = dict(
        channels=8,
        num_groups=2,
        kernel_size=3,
        stride=1,
        grid=ExtendedGrid(),
        limit=ClampedPoints(),
    )
    return DeformedKeys(**{**arguments, **changes})


def with_constant_offset(deformed: DeformedKeys, x: float, y: float) -> DeformedKeys:
    """Every key is moved by (x, y): the norm gives 10, as does GELU, and 10 (y, x) / 10 is left."""
    network = deformed.offset_network
    with torch.no_grad():
        network.norm.weight.zero_()
        network.norm.bias.fill_(10.0)
        network.output.weight.zero_()
        network.output.weight[:, 0] = torch.tensor([y, x]) / 10
    return deformed


def random_map(height: int, width: int, channels: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, height, width, channels, generator=generator)


def points_of(deformed: DeformedKeys, height: int, width: int) -> Tensor:
    features = random_map(height, width)
    points = deformed(features, features).points
    assert points is not None
    return points


def test_half_pixel_grid() -> None:
    grid = HalfPixelGrid()
    expected = torch.tensor([-0.75, -0.25, 0.25, 0.75])  # centres of the quarters of [-1, 1]
    torch.testing.assert_close(grid.key_positions(4, CPU), expected)
    torch.testing.assert_close(grid.query_positions(4, CPU), expected)
    assert grid.intervals(4) == 4


def test_extended_grid() -> None:
    grid = ExtendedGrid()
    # 2 (i + 1/2) / 5 - 1: the last is beyond the map.
    expected = torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8, 1.2])
    torch.testing.assert_close(grid.key_positions(6, CPU), expected)
    torch.testing.assert_close(
        grid.query_positions(5, CPU), torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    )
    assert grid.intervals(6) == 5


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        # tanh(artanh(0.5)) * 2 / (4, 8) = (0.25, 0.125)
        (BoundedOffsets(range_factor=2.0), (1.05, 0.025)),
        (BoundedOffsets(range_factor=0.0), (0.8, -0.1)),
        (UnboundedOffsets(), (0.8 + math.atanh(0.5), -0.1 + math.atanh(0.5))),
        (SquashedPoints(), (math.tanh(0.8 + math.atanh(0.5)), math.tanh(-0.1 + math.atanh(0.5)))),
        (ClampedPoints(), (1.0, -0.1 + math.atanh(0.5))),
    ],
)
def test_limits(limit: OffsetLimit, expected: tuple[float, float]) -> None:
    offsets = torch.full((1, 2), math.atanh(0.5))
    points = limit(offsets, torch.tensor([[0.8, -0.1]]), torch.tensor([4.0, 8.0]))
    torch.testing.assert_close(points, torch.tensor([expected]))


def test_range_is_divided_by_the_keys_of_each_axis() -> None:
    # tanh(20) = 1, so that all 4 columns move by 2/4 and both rows by 2/2.
    limit = BoundedOffsets(range_factor=2.0)
    at_rest = points_of(with_constant_offset(keys(grid=HalfPixelGrid(), limit=limit), 0, 0), 2, 4)
    moved = points_of(with_constant_offset(keys(grid=HalfPixelGrid(), limit=limit), 20, 20), 2, 4)
    torch.testing.assert_close(moved - at_rest, torch.tensor([0.5, 1.0]).expand(2, 2, 8, 2))


def test_undeformed_points_are_the_grid_in_x_and_y() -> None:
    deformed = with_constant_offset(keys(grid=HalfPixelGrid(), limit=UnboundedOffsets()), 0, 0)
    tokens = deformed(random_map(2, 4), random_map(2, 4))
    x, y = [-0.75, -0.25, 0.25, 0.75], [-0.5, 0.5]
    expected = torch.tensor([(column, row) for row in y for column in x])
    torch.testing.assert_close(tokens.points, expected.expand(2, 2, 8, 2))
    torch.testing.assert_close(tokens.query_points, expected)
    assert tokens.map_shape == (2, 4)


def test_first_row_of_the_published_network_moves_down_and_the_second_right() -> None:
    at_rest = points_of(with_constant_offset(keys(limit=UnboundedOffsets()), 0, 0), 4, 5)
    moved = points_of(with_constant_offset(keys(limit=UnboundedOffsets()), 0.1, 0.3), 4, 5)
    torch.testing.assert_close(moved - at_rest, torch.tensor([0.1, 0.3]).expand(2, 2, 20, 2))


def test_whole_cells_are_gathered() -> None:
    # In a map of 5x5 the grid lies at cells i + 1/2: pixel = (p + 1) / 2 * 4. An offset of 1/4 is
    # half a cell, so that key i takes cell i + 1; one of -3/4 takes cell i - 1.
    features = random_map(5, 5)
    deformed = with_constant_offset(keys(limit=UnboundedOffsets()), 0.25, -0.75)
    sampled = deformed(features, features).features.unflatten(1, (5, 5))
    expected = torch.zeros_like(features)
    expected[:, 1:, :-1] = features[:, :-1, 1:]  # what comes from outside is zero
    torch.testing.assert_close(sampled, expected, atol=1e-5, rtol=1e-5)


def test_clamped_points_repeat_the_border() -> None:
    features = random_map(5, 5)
    deformed = with_constant_offset(keys(limit=ClampedPoints()), 0.25, -0.75)
    sampled = deformed(features, features).features.unflatten(1, (5, 5))
    expected = features[:, [0, 0, 1, 2, 3]][:, :, [1, 2, 3, 4, 4]]
    torch.testing.assert_close(sampled, expected, atol=1e-5, rtol=1e-5)


def test_a_point_between_four_cells_is_their_mean() -> None:
    features = random_map(2, 2, channels=4)
    sampled = sample_map(features, torch.zeros(2, 1, 1, 2))
    torch.testing.assert_close(sampled, features.mean(dim=(1, 2))[:, None])


def test_groups_of_channels_are_sampled_at_their_own_points() -> None:
    features = random_map(3, 3, channels=4)
    corners = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])  # bottom left, top right
    sampled = sample_map(features, corners[None, :, None].expand(2, 2, 1, 2))
    torch.testing.assert_close(sampled[:, 0, :2], features[:, 2, 0, :2])
    torch.testing.assert_close(sampled[:, 0, 2:], features[:, 0, 2, 2:])


def test_groups_have_points_of_their_own_from_one_network() -> None:
    deformed, features, query = keys(), random_map(4, 4), random_map(4, 4)
    points = deformed(features, query).points
    swapped = deformed(features, query.roll(4, dims=-1)).points
    assert points is not None
    torch.testing.assert_close(swapped, points.flip(1))
    assert not torch.allclose(points[:, 0], points[:, 1])


def test_offset_network_is_the_published_sequence() -> None:
    deformed, query = keys(kernel_size=5, stride=2), random_map(6, 7)
    network = deformed.offset_network
    group = query[..., 4:].permute(0, 3, 1, 2)  # the second of two groups
    hidden = torch.nn.functional.conv2d(
        group, network.depthwise.weight, network.depthwise.bias, stride=2, padding=2, groups=4
    ).permute(0, 2, 3, 1)
    hidden = torch.nn.functional.layer_norm(hidden, (4,))
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    y, x = (hidden @ network.output.weight.T).unbind(-1)
    torch.testing.assert_close(network(query)[:, 1], torch.stack((x, y), dim=-1))


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "map_shape", "expected"),
    [
        (9, 8, None, (16, 20), (2, 3)),  # rounded up
        (5, 2, None, (7, 6), (4, 3)),
        (3, 1, None, (5, 4), (5, 4)),
        (2, 2, None, (7, 6), (3, 3)),  # rounded down: no padding where the kernel is the stride
        (3, 3, 1, (7, 6), (3, 2)),
        (2, 2, None, (1, 6), (1, 3)),  # smaller than the kernel
    ],
)
def test_size_of_the_key_map(
    kernel_size: int,
    stride: int,
    padding: int | None,
    map_shape: tuple[int, int],
    expected: tuple[int, int],
) -> None:
    deformed = keys(kernel_size=kernel_size, stride=stride, padding=padding)
    tokens = deformed(random_map(*map_shape), random_map(*map_shape))
    assert tokens.map_shape == expected
    assert tokens.points is not None and tokens.query_points is not None
    assert tokens.points.shape == (2, 2, math.prod(expected), 2)
    assert tokens.features.shape == (2, math.prod(expected), 8)
    assert tokens.query_points.shape == (math.prod(map_shape), 2)


def test_a_single_clamped_key_row_lies_at_the_far_edge() -> None:
    # The published formula, 2 * (1/2) / 0 - 1, is infinite before it is clamped.
    deformed = with_constant_offset(keys(), -0.5, -0.5)
    points = points_of(deformed, 1, 5)
    assert (points[..., 1] == 1).all()
    # Five columns: 2 (i + 1/2) / 4 - 1 - 0.5 = -1.25, -0.75, ..., 0.75; the first is clamped.
    torch.testing.assert_close(points[0, 0, :, 0], torch.tensor([-1, -0.75, -0.25, 0.25, 0.75]))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("grid", [HalfPixelGrid(), ExtendedGrid()])
@pytest.mark.parametrize("map_shape", [(1, 1), (1, 4), (4, 1)])
def test_single_rows_and_columns_are_finite(
    limit: OffsetLimit, grid: Any, map_shape: tuple[int, int]
) -> None:
    deformed = keys(grid=grid, limit=limit)
    features = random_map(*map_shape).requires_grad_()
    tokens = deformed(features, features)
    assert tokens.points is not None and tokens.query_points is not None
    assert tokens.points.isfinite().all()
    assert tokens.query_points.isfinite().all()
    tokens.features.square().sum().backward()
    gradients = [features.grad, *(parameter.grad for parameter in deformed.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_unmoved_keys_of_a_single_row_are_at_the_queries() -> None:
    deformed = with_constant_offset(keys(limit=BoundedOffsets(range_factor=2.0)), 0, 0)
    tokens = deformed(random_map(1, 1), random_map(1, 1))
    assert tokens.points is not None
    torch.testing.assert_close(tokens.points[0, 0], tokens.query_points)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_points_of_16_bit_features_are_float32(dtype: torch.dtype) -> None:
    limit, features = BoundedOffsets(range_factor=2.0), random_map(30, 40)
    # An offset that 16 bits hold exactly, but not its hyperbolic tangent.
    deformed = with_constant_offset(keys(grid=HalfPixelGrid(), limit=limit), 0.625, -0.625)
    expected = deformed(features, features)
    with torch.autocast("cpu", dtype):
        tokens = deformed(features.to(dtype), features.to(dtype))
    # Rounded to 16 bits, these positions would be off by up to 2e-3 (bfloat16) or 2e-4.
    assert tokens.points is not None and tokens.points.dtype == torch.float32
    torch.testing.assert_close(tokens.points, expected.points, atol=1e-6, rtol=0)
    assert tokens.features.dtype == dtype
    torch.testing.assert_close(tokens.features.float(), expected.features, atol=0.03, rtol=0.03)


def test_pooled_keys_are_means_without_places() -> None:
    features = random_map(5, 4)
    tokens = PooledKeys(kernel_size=2)(features, features)
    assert tokens.map_shape == (2, 2)  # the fifth row fills no square
    torch.testing.assert_close(tokens.features[:, 1], features[:, :2, 2:].mean(dim=(1, 2)))
    torch.testing.assert_close(tokens.features[:, 2], features[:, 2:4, :2].mean(dim=(1, 2)))
    assert tokens.points is None and tokens.query_points is None


def test_pooled_keys_of_a_map_smaller_than_the_square() -> None:
    features = random_map(1, 4)
    tokens = PooledKeys(kernel_size=2)(features, features)
    assert tokens.map_shape == (1, 2)
    torch.testing.assert_close(tokens.features[:, 1], features[:, 0, 2:].mean(dim=1))


def test_state_dict() -> None:
    shapes = {name: tuple(value.shape) for name, value in keys(kernel_size=5).state_dict().items()}
    assert shapes == {
        "offset_network.depthwise.weight": (4, 1, 5, 5),
        "offset_network.depthwise.bias": (4,),
        "offset_network.norm.weight": (4,),
        "offset_network.norm.bias": (4,),
        "offset_network.output.weight": (2, 4),
    }
    assert not PooledKeys(kernel_size=2).state_dict()


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"channels": 9}, ["channels=9", "num_groups=2"]),
        ({"num_groups": 0}, ["channels=8", "num_groups=0"]),
        ({"stride": 0}, ["kernel_size=3", "stride=0"]),
        ({"kernel_size": 0}, ["kernel_size=0", "stride=1"]),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, int], numbers: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        keys(**changes)
    assert all(number in str(refused.value) for number in numbers)


def test_negative_range_and_empty_squares_are_refused() -> None:
    with pytest.raises(ConfigError, match="range_factor=-1"):
        BoundedOffsets(range_factor=-1)
    with pytest.raises(ConfigError, match="kernel_size=0"):
        PooledKeys(kernel_size=0)


@pytest.mark.parametrize("grid", [HalfPixelGrid(), ExtendedGrid()])
def test_double_precision(grid: SamplingGrid) -> None:
    """Seven is no power of two: float32 positions would be off by 1e-8."""
    keys = DeformedKeys(
        channels=4, num_groups=2, kernel_size=3, stride=1, grid=grid, limit=UnboundedOffsets()
    ).double()
    for parameter in keys.parameters():
        nn.init.zeros_(parameter)
    features = torch.randn(1, 7, 7, 4, dtype=torch.float64)
    tokens = keys(features, features)
    expected = grid.key_positions(7, torch.device("cpu"), torch.float64)
    assert tokens.points is not None and tokens.query_points is not None
    assert tokens.points.dtype == tokens.query_points.dtype == torch.float64
    assert (tokens.points[0, 0, :7, 0] - expected).abs().max() < 1e-15
