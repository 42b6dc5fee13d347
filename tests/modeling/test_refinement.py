"""How boxes follow from corrections, and which gradients each rule lets pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_detr.boxes import inverse_sigmoid
from efficient_detr.modeling.attention import DeformableDecoderAttention, SelfAttention
from efficient_detr.modeling.decoder import DecoderLayer, StoredQueryPosition, TransformerDecoder
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.queries import ReferencePointQueries
from efficient_detr.modeling.refinement import (
    FixedReferences,
    IterativeRefinement,
    LookForwardTwice,
    References,
    corrected,
)
from efficient_detr.structures import DecoderOutput, Queries
from tests.tiny_models import logit, random_tokens, with_noise

SHAPES = [(4, 6), (2, 3)]
ALL = [FixedReferences, IterativeRefinement, LookForwardTwice]


class AddedHead(nn.Module):
    """Predicts the features themselves, scaled, so that corrections can be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def regress(self, features: Tensor) -> Tensor:
        return self.scale * features


def head() -> Any:
    return AddedHead()


def logits(*probabilities: float) -> Tensor:
    return torch.tensor([[[logit(p) for p in probabilities]]])


def test_without_references_the_correction_is_the_box() -> None:
    correction = torch.tensor([[[0.0, math.log(3), -math.log(3), math.log(4)]]])
    expected = torch.tensor([[[0.5, 0.75, 0.25, 0.8]]])
    torch.testing.assert_close(corrected(correction, None), expected)
    boxes, references = FixedReferences()(head(), correction, correction, None)
    torch.testing.assert_close(boxes, expected)
    assert references is None


def test_a_point_shifts_the_centre_only() -> None:
    """Point (0.5, 0.8), of logits 0 and log 4: centre log 3 + 0 -> 3/4 and -log 4 + log 4 -> 1/2.

    The size is that of the correction alone: -log 3 -> 1/4 and 0 -> 1/2.
    """
    correction = torch.tensor([[[math.log(3), -math.log(4), -math.log(3), 0.0]]])
    start = FixedReferences().start(torch.tensor([[[0.5, 0.8]]]))
    expected = torch.tensor([[[0.75, 0.5, 0.25, 0.5]]])
    torch.testing.assert_close(corrected(correction, start), expected)


def test_a_box_is_corrected_in_all_four() -> None:
    """Odds multiply: 1 x 3, 4 x 1/4, 1/3 x 3 and 1/4 x 4 are the odds of 3/4, 1/2, 1/2, 1/2."""
    correction = torch.tensor([[[math.log(3), -math.log(4), math.log(3), math.log(4)]]])
    start = FixedReferences().start(torch.tensor([[[0.5, 0.8, 0.25, 0.2]]]))
    expected = torch.tensor([[[0.75, 0.5, 0.5, 0.5]]])
    torch.testing.assert_close(corrected(correction, start), expected)


@pytest.mark.parametrize(("rule", "eps"), [(FixedReferences, 1e-5), (LookForwardTwice, 1e-3)])
def test_the_bound_of_the_inverse_sigmoid(rule: type, eps: float) -> None:
    """Of 0 and 1 the logits are log(eps / 1) and log(1 / eps)."""
    boxes = torch.tensor([[[0.0, 1.0, 0.5, 0.5]]])
    start = rule().start(boxes)
    assert start.attended is boxes
    expected = [math.log(eps), -math.log(eps), 0.0, 0.0]
    assert start.logits.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    other = rule(eps=0.01).start(boxes)
    assert other.logits.flatten().tolist() == pytest.approx([math.log(0.01), -math.log(0.01), 0, 0])


@pytest.mark.parametrize("size", [2, 4])
def test_fixed_references_stay(size: int) -> None:
    """Every layer corrects the first references; the raw content plays no part."""
    rule, start = FixedReferences(), FixedReferences().start(torch.rand(2, 3, size))
    state = torch.randn(2, 3, 4)
    boxes, following = rule(head(), torch.full((2, 3, 4), math.nan), state, start)
    assert following is start
    torch.testing.assert_close(boxes, corrected(state, start))


@pytest.mark.parametrize("size", [2, 4, None])
def test_iterative_refinement_hands_on_its_boxes(size: int | None) -> None:
    """The next layer gets boxes even where this one started from points or from nothing."""
    rule, state = IterativeRefinement(), torch.randn(2, 3, 4, requires_grad=True)
    start = None if size is None else rule.start(torch.rand(2, 3, size))
    boxes, following = rule(head(), torch.full((2, 3, 4), math.nan), state, start)
    torch.testing.assert_close(boxes, corrected(state, start))
    assert boxes.requires_grad
    assert torch.equal(following.attended, boxes.detach())
    torch.testing.assert_close(following.logits, torch.logit(boxes.detach()), rtol=1e-4, atol=1e-4)
    assert not following.attended.requires_grad and not following.logits.requires_grad


def test_look_forward_twice_by_hand() -> None:
    """Reference 1/2 everywhere: box odds e^state, what is handed on has odds e^content.

    Box 3/4 from the state log 3, next reference 4/5 from the content log 4.
    """
    rule, module = LookForwardTwice(), head()
    content = torch.full((1, 1, 4), math.log(4))
    state = torch.full((1, 1, 4), math.log(3))
    start = rule.start(torch.full((1, 1, 4), 0.5))
    boxes, following = rule(module, content, state, start)
    torch.testing.assert_close(boxes, torch.full((1, 1, 4), 0.75))
    torch.testing.assert_close(following.attended, torch.full((1, 1, 4), 0.8))
    torch.testing.assert_close(following.logits, torch.full((1, 1, 4), math.log(4)))
    assert not following.attended.requires_grad
    assert following.logits.requires_grad
    # d logit(sigmoid(scale * content)) / d scale = content, four times.
    (gradient,) = torch.autograd.grad(following.logits.sum(), module.scale)
    assert gradient.item() == pytest.approx(4 * math.log(4), rel=1e-4)


def test_look_forward_twice_hands_on_from_references_without_gradient() -> None:
    """The chain has two links: the box of the layer before does not reach what goes on."""
    rule, attended = LookForwardTwice(), torch.full((1, 1, 4), 0.3)
    given = torch.randn(1, 1, 4, requires_grad=True)
    boxes, following = rule(
        head(), torch.randn(1, 1, 4), torch.randn(1, 1, 4), References(attended, given)
    )
    (gradient,) = torch.autograd.grad(boxes.sum(), given, retain_graph=True)
    assert gradient.abs().sum() > 0
    (gradient,) = torch.autograd.grad(following.logits.sum(), given, allow_unused=True)
    assert gradient is None


def run(rule: type[FixedReferences], given: Queries | None = None) -> tuple[Any, DecoderOutput]:
    """A three-layer decoder away from its start, and what it predicts from boxes."""
    module = TransformerDecoder(
        layers=[
            DecoderLayer(
                self_attention=SelfAttention(channels=8, num_heads=2),
                cross_attention=DeformableDecoderAttention(
                    channels=8, num_heads=2, num_levels=2, num_points=2
                ),
                feedforward=FeedForward(channels=8, hidden_channels=12),
                channels=8,
            )
            for _ in range(3)
        ],
        heads=[PredictionHead(channels=8, num_classes=3) for _ in range(3)],
        query_position=StoredQueryPosition(),
        refinement=rule(),
    )
    with_noise(module, 0.2)
    given = given or Queries(
        content=torch.randn(2, 5, 8),
        position=torch.randn(2, 5, 8),
        reference_boxes=torch.rand(2, 5, 4) * 0.8 + 0.1,
    )
    return module, module(given, random_tokens(SHAPES, batch=2))


def reaches(value: Tensor, parameters: list[Tensor]) -> bool:
    gradients = torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True)
    return any(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("rule", [FixedReferences, IterativeRefinement])
def test_a_box_reaches_its_own_head_only(rule: type[FixedReferences]) -> None:
    module, output = run(rule)
    heads = [list(h.box_layers.parameters()) for h in module.heads]
    reached = [[reaches(output.boxes[i], heads[j]) for j in range(3)] for i in range(3)]
    assert reached == [[i == j for j in range(3)] for i in range(3)]


def test_refinement_goes_on_from_the_box_of_the_layer_before() -> None:
    """Each layer's references are the boxes before it; with fixed ones all are the first."""
    _, output = run(IterativeRefinement)
    assert output.references is not None
    assert torch.equal(output.references, output.boxes.detach())
    assert not output.references.requires_grad
    given = Queries(torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2, 5, 2))
    _, output = run(FixedReferences, given)
    assert output.references is not None and given.reference_boxes is not None
    assert torch.equal(output.references, given.reference_boxes.expand(3, 2, 5, 2))


def test_which_boxes_train_learned_reference_points() -> None:
    """All with fixed references; with refinement the first alone, by its box.

    Later layers reach the points through the content, as the first layer looks around them: so the
    gradient is compared where the content stands still.
    """
    rule_reach = {}
    for rule in (FixedReferences, IterativeRefinement):
        points = torch.rand(1, 1, 2).requires_grad_()
        references: Any = rule().start(points)
        boxes = []
        for correction in torch.randn(3, 1, 1, 4):
            box, references = rule()(head(), correction, correction, references)
            boxes.append(box)
        rule_reach[rule] = [reaches(box, [points]) for box in boxes]
    assert rule_reach == {
        FixedReferences: [True, True, True],
        IterativeRefinement: [True, False, False],
    }


def test_learned_reference_points_are_trained_in_a_decoder() -> None:
    source = ReferencePointQueries(num_queries=5, channels=8)
    memory = random_tokens(SHAPES, batch=2)
    _, output = run(FixedReferences, source(memory, None))
    for boxes in output.boxes:
        assert reaches(boxes, [source.reference_points.weight])


@pytest.mark.parametrize("rule", ALL)
def test_a_head_that_predicts_zero_keeps_the_references(rule: type[FixedReferences]) -> None:
    module, start = rule(), torch.rand(1, 2, 4) * 0.8 + 0.1
    zeros = torch.zeros(1, 2, 4)
    references: Any = module.start(start)
    for _ in range(3):
        boxes, references = module(head(), zeros, zeros, references)
        torch.testing.assert_close(boxes, start)
    torch.testing.assert_close(references.logits, inverse_sigmoid(start, module.eps))
