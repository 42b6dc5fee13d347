"""Neighbourhood attention as a layer; the operator inside has tests of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.neighborhood_attention import NeighborhoodAttention


def make(channels: int, heads: int, kernel_size: int) -> NeighborhoodAttention:
    attention = NeighborhoodAttention(channels=channels, num_heads=heads, kernel_size=kernel_size)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    return attention.double()


def by_definition(attention: NeighborhoodAttention, features: Tensor) -> Tensor:
    """One query and head after the other, with projections taken apart."""
    batch, height, width, channels = features.shape
    size, heads = attention.kernel_size, attention.num_heads
    full_height, full_width = max(height, size), max(width, size)
    padded = features.new_zeros(batch, full_height, full_width, channels)
    padded[:, :height, :width] = features
    query, key, value = attention.projection(padded).split(channels, -1)
    output = torch.zeros_like(features)
    depth = channels // heads
    for y in range(height):
        for x in range(width):
            top = min(max(y - size // 2, 0), full_height - size)
            left = min(max(x - size // 2, 0), full_width - size)
            for head in range(heads):
                own = slice(head * depth, (head + 1) * depth)
                logits = torch.stack(
                    [
                        (query[:, y, x, own] * key[:, row, column, own]).sum(-1) / depth**0.5
                        + attention.relative_position_bias_table[
                            head, row - y + size - 1, column - x + size - 1
                        ]
                        for row in range(top, top + size)
                        for column in range(left, left + size)
                    ],
                    -1,
                )
                seen = value[:, top : top + size, left : left + size, own].flatten(1, 2)
                output[:, y, x, own] = (logits.softmax(-1)[:, None] @ seen)[:, 0]
    return attention.output(output)


@pytest.mark.parametrize(
    ("kernel_size", "height", "width"),
    [(3, 5, 9), (3, 2, 10), (5, 11, 6), (7, 10, 9), (7, 7, 7), (7, 4, 9), (3, 1, 1), (1, 2, 3)],
)
def test_by_definition(kernel_size: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    attention = make(channels=6, heads=3, kernel_size=kernel_size)
    features = torch.randn(2, height, width, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = by_definition(attention, features)
    torch.testing.assert_close(attention(features), expected)


def test_padding_takes_part() -> None:
    """With equal logits, one cell gets the mean of 9: its own value and 8 times the padding's."""
    torch.manual_seed(0)
    attention = make(channels=4, heads=2, kernel_size=3)
    with torch.no_grad():
        attention.projection.weight[:8] = 0
        attention.relative_position_bias_table.zero_()
    cell = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    value, bias = attention.projection.weight[8:], attention.projection.bias[8:]
    torch.testing.assert_close(attention(cell), attention.output(cell @ value.T / 9 + bias))


def test_gradients() -> None:
    """Of a map that needs padding and has several tiles, by the input and by every parameter."""
    torch.manual_seed(0)
    attention = make(channels=4, heads=2, kernel_size=3)
    names, parameters = zip(*attention.named_parameters(), strict=True)
    features = torch.randn(1, 2, 10, 4, dtype=torch.float64, requires_grad=True)

    def run(features: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(attention, named, (features,))

    assert torch.autograd.gradcheck(run, (features, *parameters), fast_mode=True)


def test_parameters() -> None:
    torch.manual_seed(0)
    attention = NeighborhoodAttention(channels=64, num_heads=16, kernel_size=7)
    shapes = {name: tuple(value.shape) for name, value in attention.state_dict().items()}
    assert shapes == {
        "projection.weight": (192, 64),
        "projection.bias": (192,),
        "output.weight": (64, 64),
        "output.bias": (64,),
        "relative_position_bias_table": (16, 13, 13),
    }
    # 2704 draws: the standard error of their deviation is 1.4 %.
    assert attention.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.06)


@pytest.mark.parametrize(
    ("heads", "kernel_size", "culprit"),
    [
        (3, 7, "num_heads=3"),
        (0, 7, "num_heads=0"),
        (2, 4, "kernel_size=4"),
        (2, -1, "kernel_size=-1"),
    ],
)
def test_bad_arguments(heads: int, kernel_size: int, culprit: str) -> None:
    with pytest.raises(ConfigError, match=culprit):
        NeighborhoodAttention(channels=8, num_heads=heads, kernel_size=kernel_size)
