"""Queries that are the same for every image."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from efficient_detr.modeling.queries import LearnedQueries, QuerySource, ReferencePointQueries
from efficient_detr.structures import Queries
from tests.tiny_models import random_tokens

MEMORY = random_tokens([(2, 3)], batch=3)
BOTH = pytest.mark.parametrize("family", [LearnedQueries, ReferencePointQueries])


@BOTH
def test_queries_are_shared_by_the_batch(family: type[QuerySource]) -> None:
    queries: Queries = family(num_queries=5, channels=8)(MEMORY, None)
    for tensor in (queries.content, queries.position, queries.reference_boxes):
        if tensor is not None:
            assert tensor.shape[:2] == (3, 5)
            assert torch.equal(tensor[0], tensor[2])
    assert queries.content.shape == (3, 5, 8)
    assert queries.attention_mask is None and queries.denoising is None
    assert queries.proposal is None


@BOTH
def test_they_start_from_a_normal_distribution(family: type[QuerySource]) -> None:
    """Mean 0 and deviation 1, of at least 20 000 draws: within five standard errors."""
    module = family(num_queries=200, channels=100)
    ((_, embedding),) = [(n, p) for n, p in module.named_parameters() if p.shape[0] == 200]
    assert abs(embedding.mean().item()) < 5 / math.sqrt(20_000)
    assert embedding.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * 20_000))


def test_learned_queries_are_positions() -> None:
    module = LearnedQueries(num_queries=5, channels=8)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"position": (5, 8)}
    queries: Queries = module(MEMORY, None)
    assert queries.position is not None and queries.reference_boxes is None
    assert torch.equal(queries.position[1], module.position)
    assert queries.content.eq(0).all() and not queries.content.requires_grad
    queries.position.sum().backward()
    assert module.position.grad is not None and module.position.grad.eq(3).all()


def build_with_points() -> ReferencePointQueries:
    """Two queries of two channels, their points the sigmoid of (first, first + second + 1)."""
    module = ReferencePointQueries(num_queries=2, channels=2)
    with torch.no_grad():
        module.embedding.copy_(
            torch.tensor([[math.log(3), -1.0, 5.0, 6.0], [-math.log(4), math.log(4), 7.0, 8.0]])
        )
        module.reference_points.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        module.reference_points.bias.copy_(torch.tensor([0.0, 1.0]))
    return module


def test_reference_points_by_hand() -> None:
    """The first half of an embedding is the position, which alone says the point.

    Query 0: sigmoid(log 3) = 3/4 and sigmoid(log 3 - 1 + 1) = 3/4. Query 1: sigmoid(-log 4) = 1/5
    and sigmoid(0 + 1).
    """
    queries: Queries = build_with_points()(MEMORY, None)
    assert queries.position is not None and queries.reference_boxes is not None
    position = [[math.log(3), -1.0], [-math.log(4), math.log(4)]]
    torch.testing.assert_close(queries.position[0], torch.tensor(position))
    assert queries.content[0].tolist() == [[5, 6], [7, 8]]
    expected = torch.tensor([[0.75, 0.75], [0.2, 1 / (1 + math.exp(-1))]])
    torch.testing.assert_close(queries.reference_boxes[2], expected)


def test_reference_points_are_learned_through_the_position() -> None:
    module = build_with_points()
    queries: Queries = module(MEMORY, None)
    assert queries.reference_boxes is not None
    queries.reference_boxes.sum().backward()
    gradient = module.embedding.grad
    assert gradient is not None
    assert (gradient[:, :2] != 0).all() and gradient[:, 2:].eq(0).all()
    weight: Tensor | None = module.reference_points.weight.grad
    assert weight is not None and weight.abs().sum() > 0


def test_reference_points_start_xavier_uniform() -> None:
    """From C = 32 to 2: within sqrt(6 / 34), and no bias."""
    layer: nn.Linear = ReferencePointQueries(num_queries=5, channels=32).reference_points
    assert 0.9 < layer.weight.abs().max() / math.sqrt(6 / 34) <= 1
    assert layer.bias.eq(0).all()


def test_what_they_offer() -> None:
    offered = {
        family: (
            family.needs_proposals,
            family.gives_positions,
            family.gives_references,
            family.gives_boxes,
        )
        for family in (LearnedQueries, ReferencePointQueries)
    }
    assert offered == {
        LearnedQueries: (False, True, False, False),
        ReferencePointQueries: (False, True, True, False),
    }


def test_forward_is_abstract() -> None:
    class Unfinished(QuerySource):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished does not define forward"):
        Unfinished()(MEMORY, None)
