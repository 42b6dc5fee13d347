"""The theory of hashing against simulation with our own hash, and bounds against attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import Tensor

from efficient_detr.ops.lsh_clustering import draw_projections, hash_keys
from efficient_detr.ops.lsh_theory import attention_error_bound, collision_probability


def simulate(distance: float, width: float, rounds: int, *, draws: int = 1500) -> float:
    """Share of token pairs at a distance that get equal keys."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(100, 1, 1, 32, generator=generator) * 3
    step = F.normalize(torch.randn(first.shape, generator=generator), dim=-1) * distance
    pairs = torch.cat([first, first + step], dim=2)  # (100, 1, 2, D)
    equal = 0.0
    for _ in range(draws):
        projections = draw_projections(
            32, rounds, width=width, bias_range=width, generator=generator
        )
        keys = hash_keys(pairs, projections)
        equal += float((keys[..., 0] == keys[..., 1]).double().mean()) / draws
    return equal


@pytest.mark.parametrize(("distance", "rounds"), [(0.8, 1), (2.0, 1), (4.0, 1), (8.0, 1), (1.0, 4)])
def test_collisions_of_our_hash(distance: float, rounds: int) -> None:
    expected = float(collision_probability(torch.tensor(distance), 8.0, rounds))
    assert simulate(distance, 8.0, rounds) == pytest.approx(expected, abs=0.015)


def by_integration(distance: float, width: float) -> float:
    """Integral over the projected distance s of its density times (1 - s / width)."""

    def density(s: float) -> float:
        return 2 / distance * stats.norm.pdf(s / distance) * (1 - s / width)

    return float(integrate.quad(density, 0, width, points=[min(distance, width)])[0])


@pytest.mark.parametrize("distance", [0.01, 0.5, 3.0, 8.0, 40.0, 1000.0])
def test_the_integral(distance: float) -> None:
    probability = collision_probability(torch.tensor(distance, dtype=torch.float64), 8.0)
    assert float(probability) == pytest.approx(by_integration(distance, 8.0), rel=1e-8)


def test_limits() -> None:
    """Near 0, 1 - sqrt(2 / pi) distance / width; far away, width / (distance sqrt(2 pi))."""
    distance = torch.tensor([0.0, 1e-4, 1e5, math.inf])
    probability = collision_probability(distance, 8.0)
    assert probability[0] == 1 and probability[3] == 0
    slope = math.sqrt(2 / math.pi) * 1e-4 / 8
    assert float(1 - probability[1].double()) == pytest.approx(slope, abs=1e-7)
    assert float(probability[2]) == pytest.approx(8e-5 / math.sqrt(2 * math.pi), rel=1e-4)


def test_shape_and_order() -> None:
    distance = torch.linspace(0, 20, 24).reshape(2, 3, 4)
    one, four = collision_probability(distance, 8.0), collision_probability(distance, 8.0, 4)
    assert one.shape == (2, 3, 4)
    assert (one.flatten().diff() < 0).all()
    torch.testing.assert_close(four, one**4)
    assert (collision_probability(distance, 9.0) >= one).all()
    assert collision_probability(torch.tensor([3, 5]), 8.0).is_floating_point()


@pytest.mark.parametrize(("width", "rounds"), [(0.0, 1), (8.0, 0)])
def test_wrong_arguments(width: float, rounds: int) -> None:
    with pytest.raises(ValueError, match=f"width={width} must be positive and rounds={rounds}"):
        collision_probability(torch.ones(1), width, rounds)


# Attention ---------------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT).softmax(-1) @ value


@pytest.mark.parametrize("error", [0.01, 0.3, 3.0])
def test_bound_holds(error: float) -> None:
    query, key, value = torch.randn(3, 500, 6, 4, dtype=torch.float64)
    step = error * F.normalize(torch.randn_like(query), dim=-1)
    change = (attend(query + step, key, value) - attend(query, key, value)).norm(dim=-1)
    longest = [x.norm(dim=-1).amax(-1, keepdim=True) for x in (key, value)]  # (500, 1)
    bound = attention_error_bound(step.norm(dim=-1), *longest)
    assert bound.shape == change.shape
    assert (change <= bound).all()
    # Within what can ever happen, and not idly large.
    assert (bound <= 2 * longest[1]).all() and (change / bound).max() > 0.2


@pytest.mark.parametrize("shift", [0.1, 1.0, 4.0])
def test_bound_is_reached(shift: float) -> None:
    """Keys +-3 with values +-5: the output is 5 tanh(3 q), so q from -shift/6 to shift/6 makes a
    difference of 10 tanh(shift / 2), at a query distance of shift / 3."""
    key, value = torch.tensor([[3.0], [-3.0]]), torch.tensor([[5.0], [-5.0]])
    query = torch.tensor([[-shift / 6], [shift / 6]])
    low, high = attend(query, key, value)
    torch.testing.assert_close(
        (high - low)[0], attention_error_bound(torch.tensor(shift / 3), 3.0, 5.0)
    )
