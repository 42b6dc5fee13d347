"""Two-stage queries: which proposals, in which order, with and without gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.queries import (
    BestClassScore,
    BoxEmbeddedQueries,
    FirstClassScore,
    LearnedContentQueries,
    MemoryContentQueries,
)
from efficient_detr.modeling.queries.two_stage import box_embedding
from efficient_detr.structures import Proposals, Queries
from tests.tiny_models import random_tokens, randomised


def proposals(batch: int = 2, tokens: int = 9, classes: int = 3) -> Proposals:
    return Proposals(
        features=torch.randn(batch, tokens, 4),
        logits=torch.randn(batch, tokens, classes, requires_grad=True),
        box_logits=torch.randn(batch, tokens, 4, requires_grad=True),
    )


def select(module: LearnedContentQueries, given: Proposals) -> Queries:
    queries: Queries = module(random_tokens([(3, 3)]), given)
    return queries


def test_the_best_proposals_by_their_best_class_in_order() -> None:
    """Best classes of the four tokens: 1, 5, 2, 4."""
    logits = torch.tensor([[[1.0, -9], [-9, 5], [2, 1], [4, 3]]])
    box_logits = torch.arange(16.0).reshape(1, 4, 4) / 16
    module = LearnedContentQueries(num_queries=3, channels=4)
    queries = select(module, Proposals(torch.zeros(1, 4, 4), logits, box_logits))
    assert module.select(logits.amax(-1)).tolist() == [[1, 3, 2]]
    assert queries.reference_boxes is not None
    assert torch.equal(queries.reference_boxes, box_logits[:, [1, 3, 2]].sigmoid())
    assert queries.proposal is not None
    assert torch.equal(queries.proposal.logits, logits[:, [1, 3, 2]])
    # The contents are learned: query i has content i, whatever proposal it stands on.
    assert torch.equal(queries.content[0], module.content)


def test_start_boxes_have_no_gradient_but_the_proposals_do() -> None:
    given = proposals()
    queries = select(LearnedContentQueries(num_queries=4, channels=4), given)
    assert queries.reference_boxes is not None
    assert not queries.reference_boxes.requires_grad
    assert queries.proposal is not None
    assert torch.equal(queries.proposal.boxes.detach(), queries.reference_boxes)
    (queries.proposal.boxes.sum() + queries.proposal.logits.sum()).backward()
    chosen = given.logits.amax(-1).topk(4).indices
    for tensor in (given.logits, given.box_logits):
        assert tensor.grad is not None
        touched = tensor.grad.abs().sum(-1) > 0
        assert torch.equal(touched, torch.zeros_like(touched).scatter(1, chosen, True))


def test_contents_are_shared_by_the_batch() -> None:
    module = LearnedContentQueries(num_queries=4, channels=4)
    queries = select(module, proposals(batch=3))
    assert queries.content.shape == (3, 4, 4)
    queries.content.sum().backward()
    assert module.content.grad is not None
    assert module.content.grad.eq(3).all()


def test_as_many_queries_as_tokens() -> None:
    queries = select(LearnedContentQueries(num_queries=9, channels=4), proposals())
    assert queries.reference_boxes is not None
    assert queries.reference_boxes.shape == (2, 9, 4)
    assert queries.denoising is None and queries.attention_mask is None


def test_too_small_an_image() -> None:
    with pytest.raises(ValueError, match=r"9 tokens, fewer than queries.num_queries=10"):
        select(LearnedContentQueries(num_queries=10, channels=4), proposals())


EMBEDDED = [BoxEmbeddedQueries, MemoryContentQueries]
SCORES = [BestClassScore, FirstClassScore]
# Four tokens; their best classes score 1, 5, 2, 4, their first classes 1, -9, 2, 4.
LOGITS = torch.tensor([[[1.0, -9], [-9, 5], [2, 1], [4, 3]]])


def test_scores() -> None:
    assert BestClassScore()(LOGITS).tolist() == [[1, 5, 2, 4]]
    assert FirstClassScore()(LOGITS).tolist() == [[1, -9, 2, 4]]
    assert FirstClassScore.class_agnostic and not BestClassScore.class_agnostic


def embedded(family: Any, score: type, channels: int = 8, **changes: Any) -> Any:
    return randomised(family(num_queries=3, channels=channels, score=score(), **changes))


@pytest.mark.parametrize("family", EMBEDDED)
@pytest.mark.parametrize(
    ("score", "order"), [(BestClassScore, [1, 3, 2]), (FirstClassScore, [3, 2, 0])]
)
def test_the_score_chooses_and_orders(family: Any, score: type, order: list[int]) -> None:
    box_logits = torch.arange(16.0).reshape(1, 4, 4) / 16
    given = Proposals(torch.zeros(1, 4, 8), LOGITS, box_logits)
    queries = embedded(family, score)(random_tokens([(2, 2)]), given)
    assert torch.equal(queries.reference_boxes, box_logits[:, order].sigmoid())
    assert queries.content.shape == queries.position.shape == (1, 3, 8)


@pytest.mark.parametrize("family", EMBEDDED)
@pytest.mark.parametrize("score", SCORES)
def test_all_tokens_are_supervised(family: Any, score: type) -> None:
    """Selected or not; with the first class as the score, by that class alone."""
    given = proposals()
    queries = embedded(family, score)(random_tokens([(3, 3)], batch=2), given)
    assert queries.proposal.logits is given.logits
    assert torch.equal(queries.proposal.boxes, given.box_logits.sigmoid())
    assert queries.proposal.class_agnostic is (score is FirstClassScore)
    queries.proposal.boxes.sum().backward()
    assert given.box_logits.grad is not None and (given.box_logits.grad != 0).all()


def test_learned_contents_supervise_with_classes() -> None:
    queries = select(LearnedContentQueries(num_queries=3, channels=8), proposals())
    assert queries.proposal is not None and not queries.proposal.class_agnostic


def test_box_embedding_by_hand() -> None:
    """Sixteen features: four for each of cx, cy, w, h; temperature 100, wavelengths 1 and 10."""
    box = torch.tensor([[[0.25, 0.5, 0.125, 1.0]]])
    expected = []
    for value in box.flatten().tolist():
        turn = 2 * math.pi * value
        expected += [math.sin(turn), math.cos(turn), math.sin(turn / 10), math.cos(turn / 10)]
    embedding = box_embedding(box, 16, 100.0)
    assert embedding.shape == (1, 1, 16)
    assert embedding.flatten().tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [10000.0, 20.0])
def test_position_and_content_from_the_box(temperature: float) -> None:
    """The normed projection of the 2 C embedding; its first half is the position."""
    module = embedded(BoxEmbeddedQueries, FirstClassScore, temperature=temperature)
    queries = module(random_tokens([(3, 3)], batch=2), proposals(classes=1))
    assert module.projection.weight.shape == (16, 16) and module.norm.weight.shape == (16,)
    embedding = box_embedding(queries.reference_boxes, 16, temperature)
    both = module.norm(embedding @ module.projection.weight.T + module.projection.bias)
    torch.testing.assert_close(queries.position, both[..., :8])
    torch.testing.assert_close(queries.content, both[..., 8:])


def test_content_from_the_memory() -> None:
    """The selected tokens themselves, with their gradient; the position from 2 C to C."""
    module, given = embedded(MemoryContentQueries, BestClassScore), proposals()
    memory = random_tokens([(3, 3)], batch=2)
    features = memory.features.clone().requires_grad_()
    queries = module(memory.with_features(features), given)
    chosen = given.logits.amax(-1).topk(3).indices
    for image in range(2):
        assert torch.equal(queries.content[image], features[image, chosen[image]])
    assert module.projection.weight.shape == (8, 16)
    embedding = box_embedding(queries.reference_boxes, 16, 10000.0)
    expected = module.norm(embedding @ module.projection.weight.T + module.projection.bias)
    torch.testing.assert_close(queries.position, expected)
    queries.content.sum().backward()
    assert features.grad is not None
    touched = features.grad.sum(-1) == 8
    assert torch.equal(touched, torch.zeros(2, 9).bool().scatter(1, chosen, True))


@pytest.mark.parametrize("family", EMBEDDED)
def test_what_the_queries_learn_from(family: Any) -> None:
    """Boxes are handed on without gradient; projection and norm learn, the proposals do not."""
    module, given = embedded(family, BestClassScore), proposals()
    queries = module(random_tokens([(3, 3)], batch=2), given)
    assert not queries.reference_boxes.requires_grad
    (queries.position.square().sum() + queries.content.square().sum()).backward()
    assert given.logits.grad is None and given.box_logits.grad is None
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", EMBEDDED)
def test_what_embedded_queries_offer(family: Any) -> None:
    assert family.needs_proposals and family.gives_positions
    assert family.gives_references and family.gives_boxes
    assert not LearnedContentQueries.gives_positions and LearnedContentQueries.gives_boxes


@pytest.mark.parametrize("family", EMBEDDED)
def test_projection_starts_xavier_uniform(family: Any) -> None:
    """From 64 to 64 (position and content) or 32: within sqrt(6 / (64 + out))."""
    projection = family(num_queries=3, channels=32, score=BestClassScore()).projection
    bound = math.sqrt(6 / (64 + projection.out_features))
    assert 0.9 < projection.weight.abs().max() / bound <= 1


@pytest.mark.parametrize(
    "module",
    [
        LearnedContentQueries(num_queries=3, channels=8),
        embedded(BoxEmbeddedQueries, BestClassScore),
        embedded(MemoryContentQueries, BestClassScore),
    ],
)
def test_proposals_that_are_not_there(module: Any) -> None:
    with pytest.raises(ConfigError, match=r"two-stage queries need detector.proposals: set it"):
        module(random_tokens([(3, 3)]), None)
