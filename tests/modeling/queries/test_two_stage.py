"""Two-stage queries: which proposals, in which order, with and without gradient."""

from __future__ import annotations

import pytest
import torch

from efficient_detr.modeling.queries import TwoStageQueries
from efficient_detr.structures import Proposals


def proposals(batch: int = 2, tokens: int = 9, classes: int = 3) -> Proposals:
    return Proposals(
        features=torch.randn(batch, tokens, 4),
        logits=torch.randn(batch, tokens, classes, requires_grad=True),
        box_logits=torch.randn(batch, tokens, 4, requires_grad=True),
    )


def test_the_best_proposals_by_their_best_class_in_order() -> None:
    """Best classes of the four tokens: 1, 5, 2, 4."""
    logits = torch.tensor([[[1.0, -9], [-9, 5], [2, 1], [4, 3]]])
    box_logits = torch.arange(16.0).reshape(1, 4, 4) / 16
    module = TwoStageQueries(num_queries=3, channels=4)
    queries = module(Proposals(torch.zeros(1, 4, 4), logits, box_logits))
    assert module.select(logits.amax(-1)).tolist() == [[1, 3, 2]]
    assert torch.equal(queries.reference_boxes, box_logits[:, [1, 3, 2]].sigmoid())
    assert queries.proposal is not None
    assert torch.equal(queries.proposal.logits, logits[:, [1, 3, 2]])
    # The contents are learned: query i has content i, whatever proposal it stands on.
    assert torch.equal(queries.content[0], module.content)


def test_start_boxes_have_no_gradient_but_the_proposals_do() -> None:
    given = proposals()
    queries = TwoStageQueries(num_queries=4, channels=4)(given)
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
    module = TwoStageQueries(num_queries=4, channels=4)
    queries = module(proposals(batch=3))
    assert queries.content.shape == (3, 4, 4)
    queries.content.sum().backward()
    assert module.content.grad is not None
    assert module.content.grad.eq(3).all()


def test_as_many_queries_as_tokens() -> None:
    queries = TwoStageQueries(num_queries=9, channels=4)(proposals())
    assert queries.reference_boxes.shape == (2, 9, 4)
    assert queries.denoising is None and queries.attention_mask is None


def test_too_small_an_image() -> None:
    with pytest.raises(ValueError, match=r"9 tokens, fewer than queries.num_queries=10"):
        TwoStageQueries(num_queries=10, channels=4)(proposals())
