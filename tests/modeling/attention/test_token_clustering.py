"""Stored and redrawn projections, bias conventions, keys, and arguments that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.token_clustering import TokenClustering
from efficient_detr.ops.lsh_clustering import distinct_multipliers, published_multipliers

HEADS, D = 2, 8


def clustering(rounds: int = 3, width: float = 4.0, **options: Any) -> TokenClustering:
    return TokenClustering(head_channels=D, rounds=rounds, width=width, **options)


def test_projections_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = clustering(seed=3)
    assert torch.get_rng_state().equal(before)  # and leave the global generator alone
    torch.manual_seed(2)
    second, other = clustering(seed=3), clustering(seed=4)
    assert first.directions.equal(second.directions) and first.bias.equal(second.bias)
    assert not first.directions.equal(other.directions)
    assert first.state_dict() == {}
    with torch.device("meta"):  # or any other where models are built
        assert clustering(seed=3).directions.shape == first.directions.shape


def test_bias_conventions_and_keys() -> None:
    published = clustering(rounds=32, width=8.0, multipliers=published_multipliers(32))
    assert published.projections.multipliers[:4].tolist() == [1, 4, 16, 64]
    assert 0.5 < published.bias.max() < 1 and published.bias.min() >= 0
    theory = clustering(rounds=32, width=8.0, bias_range=8.0)
    torch.testing.assert_close(theory.bias, 8 * published.bias)
    assert theory.multipliers.equal(distinct_multipliers(32))


def test_redrawn_projections() -> None:
    part = clustering(redraw=True)
    points = torch.randn(1, HEADS, 60, D) * 3
    torch.manual_seed(5)
    drawn = [part(points).ids for _ in range(3)]
    assert not drawn[0].equal(drawn[1]) and not drawn[1].equal(drawn[2])
    torch.manual_seed(5)
    assert all(part(points).ids.equal(ids) for ids in drawn)
    stored = clustering()(points).ids
    part.eval()
    assert part(points).ids.equal(stored) and part(points).ids.equal(stored)


def test_padding_joins_clusters_if_asked() -> None:
    points = torch.randn(2, HEADS, 9, D)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    left_out = clustering()(points, padding).ids
    assert (left_out == -1).equal(padding[:, None].expand(2, HEADS, 9))
    included = clustering(include_padding=True)
    assert included(points, padding).ids.equal(included(points).ids)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(rounds=0), "rounds=0"),
        (dict(width=0.0), "width=0.0"),
        (dict(bias_range=-1.0), "bias_range=-1.0"),
        (dict(multipliers=published_multipliers(4)), "multipliers has 4 entries for rounds=3"),
    ],
)
def test_wrong_hashing(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        clustering(**arguments)


def test_wrong_projections() -> None:
    with pytest.raises(ValueError, match=r"directions must be \(8, 3\), but are \(8, 5\)"):
        clustering().set_projections(torch.randn(8, 5), torch.rand(3))
