"""Position biases of deformable map attention: table nodes, the network's formula, resizing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.deformed_keys import ExtendedGrid, KeyTokens
from efficient_detr.modeling.backbones.position_bias import (
    FixedPositionTable,
    LogPositionNetwork,
    PositionBias,
    RelativePositionTable,
)

ALL = slice(None)
MAP = (3, 4)


def cells(height: int, width: int) -> Tensor:
    """(H*W, 2) points (x, y) of a map's cells."""
    rows, columns = (
        ExtendedGrid().query_positions(n, torch.device("cpu")) for n in (height, width)
    )
    return torch.tensor([(x, y) for y in rows for x in columns])


def tokens_at(points: Tensor, query_points: Tensor, map_shape: tuple[int, int]) -> KeyTokens:
    """Keys at (B, G, M, 2) points."""
    return KeyTokens(torch.zeros(len(points), points.shape[2], 8), points, query_points, map_shape)


def random_table(num_heads: int, map_shape: tuple[int, int] = MAP) -> RelativePositionTable:
    torch.manual_seed(0)
    bias = RelativePositionTable(num_heads=num_heads, map_shape=map_shape)
    torch.nn.init.normal_(bias.relative_position_bias_table)
    return bias


def test_whole_cells_apart_are_entries_of_the_table() -> None:
    bias = random_table(2)
    points = cells(*MAP)
    tokens = tokens_at(points.expand(1, 1, 12, 2), points, MAP)
    table = bias.relative_position_bias_table  # (2, 5, 7)
    expected = torch.stack(
        [
            torch.stack(
                # Rows and columns from key to query, plus 2 and 3 for the centre.
                [table[:, q // 4 - k // 4 + 2, q % 4 - k % 4 + 3] for k in range(12)],
                dim=-1,
            )
            for q in range(12)
        ],
        dim=1,
    )
    torch.testing.assert_close(bias(tokens, MAP, ALL), expected[None], atol=1e-5, rtol=1e-5)


def test_centre_is_no_displacement_at_any_size() -> None:
    bias = random_table(2)
    points = cells(9, 5)
    tokens = tokens_at(points.expand(1, 1, 45, 2), points, (9, 5))
    same = bias(tokens, (9, 5), ALL).diagonal(dim1=2, dim2=3)
    centre = bias.relative_position_bias_table[:, 2, 3]
    torch.testing.assert_close(same, centre[None, :, None].expand(1, 2, 45), atol=1e-5, rtol=1e-5)


def test_between_entries_and_beyond_the_edge() -> None:
    bias = random_table(1)
    table = bias.relative_position_bias_table[0]
    # Displacements (x, y) from these keys to a query at (1, 1), halved: (1, 1) is the bottom right
    # entry, (1, 0.75) midway to the one above, (1.5, 1) a whole entry and a half beyond.
    points = torch.tensor([[-1.0, -1.0], [-1.0, -0.5], [-2.0, -1.0]])
    tokens = tokens_at(points[None, None], torch.tensor([[1.0, 1.0]]), (1, 3))
    expected = torch.stack([table[4, 6], (table[4, 6] + table[3, 6]) / 2, table.new_zeros(())])
    torch.testing.assert_close(bias(tokens, (1, 1), ALL)[0, 0, 0], expected)


def test_heads_take_the_points_of_their_group() -> None:
    bias, points = random_table(4), torch.rand(2, 2, 5, 2) * 2 - 1
    query_points = cells(*MAP)
    both = bias(tokens_at(points, query_points, (1, 5)), MAP, ALL)
    assert both.shape == (2, 4, 12, 5)
    for group in range(2):
        alone = points[:, [group, group]]
        expected = bias(tokens_at(alone, query_points, (1, 5)), MAP, ALL)
        heads = slice(2 * group, 2 * group + 2)
        torch.testing.assert_close(both[:, heads], expected[:, heads])
    assert not torch.allclose(both[:, 2:], expected[:, :2])


def test_logarithmic_network() -> None:
    bias = LogPositionNetwork(num_heads=4, num_groups=2)
    with torch.no_grad():
        for parameter in bias.parameters():
            parameter.zero_()
        # Hidden channels: y and -y, x and -x. Heads of a group: y and 10 x.
        bias.hidden.weight[:4] = torch.tensor([[1.0, 0], [-1.0, 0], [0, 1.0], [0, -1.0]])
        bias.output.weight[0, :4] = torch.tensor([1.0, -1.0, 0.0, 0.0])
        bias.output.weight[1, :4] = torch.tensor([0.0, 0.0, 10.0, -10.0])
    # Displacement (-0.75, 1.75) and twice (0, 0), for the other group the reverse:
    # log2(4 * 1.75 + 1) / 3 = 1, -log2(4 * 0.75 + 1) / 3 = -2/3.
    query_points = torch.tensor([[-0.75, 1.75]])
    points = torch.stack([torch.zeros(1, 2), 2 * query_points])[None]
    result = bias(tokens_at(points, query_points, (1, 1)), (1, 1), ALL)
    expected = torch.tensor([1.0, -20 / 3, -1.0, 20 / 3])
    torch.testing.assert_close(result.flatten(), expected)


def test_fixed_table_at_its_size() -> None:
    bias = FixedPositionTable(num_heads=2, map_shape=MAP, key_shape=(2, 2))
    tokens = KeyTokens(torch.zeros(1, 4, 8), None, None, (2, 2))
    assert torch.equal(bias(tokens, MAP, ALL), bias.position_bias_table[None])


@pytest.mark.parametrize("map_shape", [(5, 4), (2, 3), (1, 1)])
@pytest.mark.parametrize("key_shape", [(2, 2), (3, 2), (1, 1)])
def test_fixed_table_is_resized_as_an_image(
    map_shape: tuple[int, int], key_shape: tuple[int, int]
) -> None:
    bias = FixedPositionTable(num_heads=2, map_shape=MAP, key_shape=(2, 2))
    tokens = KeyTokens(torch.zeros(1, math.prod(key_shape), 8), None, None, key_shape)
    expected = F.interpolate(
        bias.position_bias_table[None],
        size=(math.prod(map_shape), math.prod(key_shape)),
        mode="bilinear",
        align_corners=True,
    )
    torch.testing.assert_close(bias(tokens, map_shape, ALL), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "bias",
    [
        RelativePositionTable(num_heads=4, map_shape=(2, 5)),
        LogPositionNetwork(num_heads=4, num_groups=2),
        FixedPositionTable(num_heads=4, map_shape=(2, 5), key_shape=(2, 2)),
    ],
)
def test_some_queries_are_rows_of_all(bias: PositionBias) -> None:
    tokens = tokens_at(torch.rand(2, 2, 5, 2), cells(*MAP), (1, 5))
    everything = bias(tokens, MAP, ALL)
    assert everything.shape[1:] == (4, 12, 5)
    torch.testing.assert_close(bias(tokens, MAP, slice(3, 8)), everything[:, :, 3:8])
    torch.testing.assert_close(bias(tokens, MAP, torch.tensor([7, 0])), everything[:, :, [7, 0]])


def test_new_tables_are_small() -> None:
    torch.manual_seed(0)
    table = RelativePositionTable(num_heads=8, map_shape=(28, 28)).relative_position_bias_table
    assert table.shape == (8, 55, 55)
    assert table.std().item() == pytest.approx(0.01, rel=0.03)


def test_state_dicts() -> None:
    log = LogPositionNetwork(num_heads=6, num_groups=3).state_dict()
    assert {name: tuple(value.shape) for name, value in log.items()} == {
        "hidden.weight": (32, 2),
        "hidden.bias": (32,),
        "output.weight": (2, 32),
    }
    fixed = FixedPositionTable(num_heads=6, map_shape=(4, 6), key_shape=(2, 3)).state_dict()
    assert {name: tuple(value.shape) for name, value in fixed.items()} == {
        "position_bias_table": (6, 24, 6)
    }
    assert list(random_table(2).state_dict()) == ["relative_position_bias_table"]


def test_keys_without_places_are_refused() -> None:
    tokens = KeyTokens(torch.zeros(1, 4, 8), None, None, (2, 2))
    with pytest.raises(ValueError, match="points"):
        random_table(2)(tokens, MAP, ALL)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"num_heads=4.*num_groups=3"):
        LogPositionNetwork(num_heads=4, num_groups=3)
    with pytest.raises(ConfigError, match=r"\(0, 7\)"):
        RelativePositionTable(num_heads=4, map_shape=(0, 7))
    with pytest.raises(ConfigError, match=r"\(7, 7\).*\(4, 0\)"):
        FixedPositionTable(num_heads=4, map_shape=(7, 7), key_shape=(4, 0))
