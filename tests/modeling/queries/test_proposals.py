"""Proposal boxes, their validity, and what invalid tokens become."""

from __future__ import annotations

import pytest
import torch

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.queries import ProposalHead
from tests.tiny_models import random_tokens, randomised

SHAPES = [(4, 8), (2, 4)]


def build(base_size: float = 0.05) -> ProposalHead:
    head = PredictionHead(channels=8, num_classes=3)
    return ProposalHead(channels=8, head=head, base_size=base_size)


def test_boxes_stand_on_the_cell_centres_and_double_by_level() -> None:
    boxes, valid = build().proposal_boxes(random_tokens(SHAPES))
    assert boxes.shape == (1, 40, 4)
    # Row 1, column 2 of level 0, and row 0, column 3 of level 1.
    torch.testing.assert_close(boxes[0, 10], torch.tensor([2.5 / 8, 1.5 / 4, 0.05, 0.05]))
    torch.testing.assert_close(boxes[0, 35], torch.tensor([3.5 / 4, 0.5 / 2, 0.1, 0.1]))
    assert valid.all()


def test_padded_image() -> None:
    """16 x 40 of 32 x 64 pixels: 2 x 5 cells on level 0; 1 x 3 (pixels 0, 16, 32) on level 1."""
    tokens = random_tokens(SHAPES, sizes=[(32, 64), (16, 40)])
    boxes, valid = build().proposal_boxes(tokens)
    torch.testing.assert_close(boxes[1, 9], torch.tensor([1.5 / 5, 1.5 / 2, 0.05, 0.05]))
    torch.testing.assert_close(boxes[1, 34], torch.tensor([2.5 / 3, 0.5, 0.1, 0.1]))
    assert valid[0].all()
    assert valid[1].sum() == 10 + 3
    assert torch.equal(valid[1], ~tokens.padding_mask[1])


def test_proposals_at_the_border_are_invalid() -> None:
    """60 columns: the first centre is at 0.5/60 = 0.0083 < 0.01, the last at 0.9917 > 0.99."""
    _, valid = build().proposal_boxes(random_tokens([(1, 60)]))
    assert valid[0].tolist() == [False] + [True] * 58 + [False]


@pytest.mark.parametrize(("base_size", "expected"), [(0.99, False), (0.5, True), (0.01, False)])
def test_size_counts_too(base_size: float, expected: bool) -> None:
    """The bounds 0.01 and 0.99 are exclusive."""
    _, valid = build(base_size).proposal_boxes(random_tokens([(2, 2)]))
    assert valid.all().item() is expected
    assert valid.any().item() is expected


def test_invalid_tokens_share_one_vector() -> None:
    module = build()
    tokens = random_tokens([(2, 60)], sizes=[(16, 240)])
    _, valid = module.proposal_boxes(tokens)
    transformed = module.transform(tokens, tokens.features)
    constant = module.norm(module.projection(torch.zeros(8)))
    torch.testing.assert_close(
        transformed[~valid], constant.expand_as(transformed[~valid]), atol=1e-6, rtol=0
    )
    expected = module.norm(module.projection(tokens.features[valid]))
    torch.testing.assert_close(transformed[valid], expected)


def test_predictions() -> None:
    module = build()
    randomised(module.head.box_layers)
    tokens = random_tokens(SHAPES, sizes=[(32, 64), (16, 40)])
    proposals = module(tokens)
    boxes, valid = module.proposal_boxes(tokens)
    assert torch.equal(proposals.logits, module.head.classify(proposals.features))
    expected = module.head.regress(proposals.features) + torch.logit(boxes)
    torch.testing.assert_close(proposals.box_logits[valid], expected[valid])
    assert proposals.box_logits[~valid].eq(torch.inf).all()


def test_unrefined_proposals_are_the_boxes() -> None:
    """The box head starts at zero, so the sigmoid gives the proposal back."""
    module, tokens = build(), random_tokens(SHAPES)
    boxes, _ = module.proposal_boxes(tokens)
    torch.testing.assert_close(module(tokens).box_logits.sigmoid(), boxes)


def test_gradients_are_finite_although_boxes_are_infinite() -> None:
    module = build()
    tokens = random_tokens([(2, 60)], sizes=[(16, 240)])
    features = tokens.features.clone().requires_grad_()
    proposals = module(tokens.with_features(features))
    (proposals.box_logits.sigmoid().sum() + proposals.logits.sum()).backward()
    assert features.grad is not None and features.grad.isfinite().all()
    for parameter in module.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_without_a_head_tokens_are_only_transformed() -> None:
    """For a selection in front of learned queries; the same transform, and no predictions."""
    whole = build()
    module = ProposalHead(channels=8)
    module.load_state_dict(
        {name: value for name, value in whole.state_dict().items() if "head" not in name}
    )
    tokens = random_tokens(SHAPES, sizes=[(32, 64), (16, 40)])
    assert torch.equal(
        module.transform(tokens, tokens.features), whole.transform(tokens, tokens.features)
    )
    with pytest.raises(ConfigError, match=r"detector.proposals \(ProposalHead\) cannot predict"):
        module(tokens)


def test_anchor_logits_are_the_boxes_before_the_sigmoid() -> None:
    module, tokens = build(), random_tokens(SHAPES, sizes=[(32, 64), (16, 40)])
    boxes, valid = module.proposal_boxes(tokens)
    logits = module.anchor_logits(tokens)
    torch.testing.assert_close(logits[valid].sigmoid(), boxes[valid])
    assert logits[~valid].eq(torch.inf).all()
