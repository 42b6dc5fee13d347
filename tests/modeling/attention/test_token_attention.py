"""The attention that each token gets: shares of the four neighbours, borders, heads and levels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efficient_detr.modeling.attention.token_attention import token_attention_map


def attention_of(*points: tuple[float, float, float], shape: tuple[int, int] = (2, 4)) -> Tensor:
    """The map (H_0, W_0) of points (x, y, weight) of one query and head on one level."""
    values = torch.tensor(points).reshape(1, 1, 1, 1, -1, 3)
    (attention,) = token_attention_map(values[..., :2], values[..., 2], [shape])
    return attention.reshape(shape)


def test_a_point_on_a_token_gives_it_all() -> None:
    """(0.25, 0.5) of 4 x 2 cells (width x height) is column 1, row 1: no half cell is taken off."""
    assert attention_of((0.25, 0.5, 0.8)).tolist() == [[0, 0, 0, 0], [0, pytest.approx(0.8), 0, 0]]


def test_a_point_between_tokens_is_shared_bilinearly() -> None:
    """(0.3125, 0.25) is at column 1.25, row 0.5.

    Columns 1 and 2 get 0.75 and 0.25, rows 0 and 1 a half each, of the weight 0.8.
    """
    expected = [[0, 0.3, 0.1, 0], [0, 0.3, 0.1, 0]]
    torch.testing.assert_close(attention_of((0.3125, 0.25, 0.8)), torch.tensor(expected))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-0.125, 0.0, [[0.5, 0, 0, 0], [0, 0, 0, 0]]),  # column -0.5
        (0.0, -0.25, [[0.5, 0, 0, 0], [0, 0, 0, 0]]),  # row -0.5
        (0.875, 0.5, [[0, 0, 0, 0], [0, 0, 0, 0.5]]),  # column 3.5 of 0 to 3
        (0.75, 0.875, [[0, 0, 0, 0], [0, 0, 0, 0.25]]),  # row 1.75 of 0 to 1
        (1.0, 0.0, [[0, 0, 0, 0], [0, 0, 0, 0]]),  # column 4: the right border itself
        (-0.25, 0.0, [[0, 0, 0, 0], [0, 0, 0, 0]]),  # column -1
        (0.0, 7e30, [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (float("nan"), 0.0, [[0, 0, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_what_falls_outside_is_dropped(x: float, y: float, expected: list[list[float]]) -> None:
    torch.testing.assert_close(attention_of((x, y, 1.0)), torch.tensor(expected).float())


def test_points_and_queries_add_up_but_heads_and_images_do_not() -> None:
    """Weight w at column c of a level of one row of four tokens."""
    locations = torch.zeros(2, 2, 2, 1, 1, 2)  # (B, Q, H, L, P, 2)
    weights = torch.zeros(2, 2, 2, 1, 1)
    for image, query, head, column, weight in [
        (0, 0, 0, 1, 0.25),
        (0, 1, 0, 1, 0.5),
        (0, 0, 1, 2, 1.0),
        (0, 1, 1, 3, 2.0),
        (1, 0, 0, 0, 4.0),
    ]:
        locations[image, query, head, 0, 0, 0] = column / 4
        weights[image, query, head] = weight
    attention = token_attention_map(locations, weights, [(1, 4)])
    assert attention.tolist() == [
        [[0, 0.75, 0, 0], [0, 0, 1, 2]],
        [[4, 0, 0, 0], [0, 0, 0, 0]],
    ]


def test_levels_follow_each_other() -> None:
    """Levels of 2 x 2, 1 x 3 and 1 x 1 tokens: points go to tokens 3, 4 + 1 and 7."""
    locations = torch.tensor([[0.5, 0.5], [1 / 3, 0.0], [0.0, 0.0]]).reshape(1, 1, 1, 3, 1, 2)
    weights = torch.tensor([0.2, 0.3, 0.5]).reshape(1, 1, 1, 3, 1)
    attention = token_attention_map(locations, weights, [(2, 2), (1, 3), (1, 1)])
    expected = torch.tensor([[[0, 0, 0, 0.2, 0, 0.3, 0, 0.5]]])
    torch.testing.assert_close(attention, expected, atol=1e-6, rtol=0)


def test_is_the_transpose_of_sampling_half_a_cell_further() -> None:
    """What a token gives to the sum of weighted samples is the gradient of that sum."""
    shapes = [(5, 7), (3, 2)]
    locations = torch.rand(2, 6, 3, 2, 4, 2) * 1.4 - 0.2
    weights = torch.rand(2, 6, 3, 2, 4)
    attention = token_attention_map(locations, weights, shapes).split([35, 6], dim=2)
    for level, (height, width) in enumerate(shapes):
        value = torch.zeros(2 * 3, 1, height, width, requires_grad=True)
        # grid_sample takes a half cell off.
        shifted = locations[:, :, :, level] + 0.5 / torch.tensor([width, height])
        grid = (2 * shifted - 1).transpose(1, 2).flatten(0, 1)  # (B H, Q, P, 2)
        sampled = F.grid_sample(value, grid, align_corners=False)[:, 0]
        (sampled * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)).sum().backward()
        assert value.grad is not None
        expected = value.grad.reshape(2, 3, height * width)
        torch.testing.assert_close(attention[level], expected, atol=1e-5, rtol=1e-5)


def test_nothing_has_a_gradient_and_sums_are_single_precision() -> None:
    locations = torch.rand(1, 2, 2, 1, 4, 2, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(1, 2, 2, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    attention = token_attention_map(locations, weights, [(8, 8)])
    assert attention.dtype is torch.float32 and not attention.requires_grad


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_the_sum_does_not_depend_on_the_number_of_threads(four_threads: None) -> None:
    shapes = [(40, 50), (20, 25)]
    locations, weights = torch.rand(2, 100, 4, 2, 4, 2), torch.rand(2, 100, 4, 2, 4)
    several = token_attention_map(locations, weights, shapes)
    torch.set_num_threads(1)
    assert torch.equal(token_attention_map(locations, weights, shapes), several)
