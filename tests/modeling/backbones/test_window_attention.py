"""Attention in windows, against attention by definition over the whole padded map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.window_attention import (
    ShiftedWindowAttention,
    WindowAttention,
)

KINDS = [WindowAttention, ShiftedWindowAttention]


def make(kind: type[WindowAttention], channels: int, heads: int, window: int) -> WindowAttention:
    attention = kind(channels=channels, num_heads=heads, window=window).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    return attention


def places(size: int, window: int, shift: int) -> list[tuple[int, int, int]]:
    """Window, place in the window and region of each cell along a padded side.

    A shifted side starts at cell `shift`; the last window is where both ends meet.
    """
    found = []
    for cell in range(size):
        place = (cell - shift) % size
        region = 0 if place < size - window else 1 if place < size - shift else 2
        found.append((place // window, place % window, region if shift else 0))
    return found


def by_definition(attention: WindowAttention, features: Tensor) -> Tensor:
    """One pair of cells after the other."""
    batch, height, width, channels = features.shape
    window, heads = attention.window, attention.num_heads
    shift = -(-window // 2) if isinstance(attention, ShiftedWindowAttention) else 0
    full_height, full_width = -(-height // window) * window, -(-width // window) * window
    padded = features.new_zeros(batch, full_height, full_width, channels)
    padded[:, :height, :width] = features
    query, key, value = (
        part.reshape(batch, -1, heads, channels // heads)
        for part in attention.projection(padded).split(channels, -1)
    )
    rows, columns = places(full_height, window, shift), places(full_width, window, shift)
    cells = [(row, column) for row in rows for column in columns]
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / (channels // heads) ** 0.5
    bias = torch.full_like(logits[0], -torch.inf)
    table = attention.relative_position_bias_table
    for q, (row, column) in enumerate(cells):
        for k, (key_row, key_column) in enumerate(cells):
            if (row[0], column[0]) == (key_row[0], key_column[0]):
                down, right = row[1] - key_row[1], column[1] - key_column[1]
                index = (down + window - 1) * (2 * window - 1) + right + window - 1
                same = (row[2], column[2]) == (key_row[2], key_column[2])
                bias[:, q, k] = table[index] - (0 if same else 100)
    attended = torch.einsum("bhqk,bkhd->bqhd", (logits + bias).softmax(-1), value)
    attended = attended.reshape(batch, full_height, full_width, channels)
    return attention.output(attended)[:, :height, :width]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("window", "height", "width"),
    [
        (3, 6, 6),
        (3, 7, 4),
        (4, 8, 8),
        (4, 5, 11),
        (7, 14, 7),
        (7, 3, 9),
        (3, 3, 3),
        (2, 1, 1),
        (1, 2, 3),
    ],
)
def test_by_definition(kind: type[WindowAttention], window: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    attention = make(kind, channels=6, heads=3, window=window)
    features = torch.randn(2, height, width, 6, dtype=torch.float64)
    torch.testing.assert_close(attention(features), by_definition(attention, features))


@pytest.mark.parametrize(("kind", "share"), [(WindowAttention, 9), (ShiftedWindowAttention, 4)])
def test_padding_takes_part(kind: type[WindowAttention], share: int) -> None:
    """With equal logits, one cell gets the mean of its values and those of the padding, the bias.

    Window 3 around a single cell has 9 cells. Shifted by 2, the last two places of each side are a
    region of their own, to which the cell belongs with 3 cells of padding.
    """
    torch.manual_seed(0)
    attention = make(kind, channels=4, heads=2, window=3)
    with torch.no_grad():
        attention.projection.weight[:8] = 0
        attention.relative_position_bias_table.zero_()
    cell = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    value, bias = attention.projection.weight[8:], attention.projection.bias[8:]
    expected = attention.output(cell @ value.T / share + bias)
    torch.testing.assert_close(attention(cell), expected)


def test_table_is_query_minus_key() -> None:
    """A large bias for "query one row below its key" makes each cell see the cell above."""
    attention = make(WindowAttention, channels=2, heads=1, window=3)
    with torch.no_grad():
        attention.relative_position_bias_table.zero_()
        attention.relative_position_bias_table[(1 + 2) * 5 + 0 + 2] = 1000.0
        attention.projection.weight.copy_(torch.cat([torch.zeros(4, 2), torch.eye(2)]))
        attention.projection.bias.zero_()
        attention.output.weight.copy_(torch.eye(2))
        attention.output.bias.zero_()
    features = torch.randn(1, 3, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(attention(features)[:, 1:], features[:, :-1])


def test_shift_is_half_a_window_rounded_up() -> None:
    """In windows of 3 shifted by 2, cells 2 to 4 of a row of 9 see each other and no one else."""
    torch.manual_seed(0)
    attention = make(ShiftedWindowAttention, channels=4, heads=1, window=3)
    features = torch.randn(1, 9, 9, 4, dtype=torch.float64)
    changed = features.clone()
    changed[:, 3, 3] += 1
    difference = (attention(changed) - attention(features)).abs().sum(-1)[0] > 1e-12
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:5, 2:5] = True
    assert torch.equal(difference, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: type[WindowAttention]) -> None:
    torch.manual_seed(0)
    attention = make(kind, channels=4, heads=2, window=3)
    names, parameters = zip(*attention.named_parameters(), strict=True)
    features = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(features: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(attention, named, (features,))

    assert torch.autograd.gradcheck(run, (features, *parameters), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_in_turn_and_copies(kind: type[WindowAttention]) -> None:
    """Nothing that depends on a size stays behind, in the module or in what is saved of it."""
    torch.manual_seed(0)
    attention = make(kind, channels=4, heads=2, window=3)
    small, large = (torch.randn(1, *size, 4, dtype=torch.float64) for size in ((4, 4), (12, 9)))
    before = attention(small)
    attention(large)
    torch.testing.assert_close(attention(small), before, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(attention)(small), before, rtol=0, atol=0)
    assert set(attention.state_dict()) == {
        "projection.weight",
        "projection.bias",
        "output.weight",
        "output.bias",
        "relative_position_bias_table",
    }


def test_initialisation() -> None:
    torch.manual_seed(0)
    table = WindowAttention(channels=64, num_heads=16, window=7).relative_position_bias_table
    assert table.shape == (169, 16)
    # 2704 draws: the standard error of their deviation is 1.4 %.
    assert table.std().item() == pytest.approx(0.01, rel=0.06)


@pytest.mark.parametrize(
    ("heads", "window", "culprit"),
    [(3, 7, "num_heads=3"), (0, 7, "num_heads=0"), (2, 0, "window=0")],
)
def test_bad_arguments(heads: int, window: int, culprit: str) -> None:
    with pytest.raises(ConfigError, match=culprit):
        ShiftedWindowAttention(channels=8, num_heads=heads, window=window)
