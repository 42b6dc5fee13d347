"""Costs by hand, and the assignment against trying everything."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from efficient_detr.errors import NonFiniteLossError
from efficient_detr.losses import FocalClassCost, HungarianMatcher, SoftmaxClassCost
from efficient_detr.structures import SetPrediction, Targets
from tests.tiny_models import logit, targets_of


def matcher(**weights: float) -> HungarianMatcher:
    return HungarianMatcher(class_cost=FocalClassCost(), **weights)


def random_prediction(batch: int, queries: int, classes: int = 4) -> SetPrediction:
    return SetPrediction(torch.randn(batch, queries, classes), torch.rand(batch, queries, 4))


def random_targets(*numbers: int) -> list[Targets]:
    boxes = [(torch.rand(n, 4) * 0.5 + 0.2).tolist() for n in numbers]
    return targets_of(*boxes, labels=[torch.randint(0, 4, (n,)).tolist() for n in numbers])


def test_class_cost() -> None:
    """p = 1/2 and p = 4/5 with alpha = 1/4, gamma = 2.

    Positive: 1/4 (1/2)^2 log 2, and 1/4 (1/5)^2 log(5/4).
    Negative: 3/4 (1/2)^2 log 2, and 3/4 (4/5)^2 log 5.
    """
    cost = FocalClassCost()(torch.tensor([[0.0, logit(0.8)]]), torch.tensor([1, 0, 1]))
    half = (0.25 - 0.75) * 0.25 * math.log(2)
    high = 0.25 * 0.04 * math.log(1.25) - 0.75 * 0.64 * math.log(5)
    assert cost.shape == (1, 3)
    assert cost[0].tolist() == pytest.approx([high, half, high], rel=1e-5)


def test_cost_is_the_weighted_sum() -> None:
    """One query at (0.5, 0.5, 0.2, 0.2), one box at (0.6, 0.5, 0.2, 0.2).

    L1: 0.1. Overlap 0.1 x 0.2 = 0.02, union 0.06, hull 0.3 x 0.2 = 0.06: GIoU 1/3 - 0.
    Class with p = 1/2: -1/8 log 2.
    """
    prediction = SetPrediction(torch.zeros(1, 1, 4), torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]))
    targets = targets_of([[0.6, 0.5, 0.2, 0.2]])
    expected = 2 * -math.log(2) / 8 + 5 * 0.1 - 2 / 3
    assert matcher().cost(prediction, targets).item() == pytest.approx(expected, abs=1e-6)
    for weights, value in (
        (dict(class_weight=3.0, box_weight=0.0, giou_weight=0.0), -3 * math.log(2) / 8),
        (dict(class_weight=0.0, box_weight=3.0, giou_weight=0.0), 0.3),
        (dict(class_weight=0.0, box_weight=0.0, giou_weight=3.0), -1.0),
    ):
        cost = matcher(**weights).cost(prediction, targets)
        assert cost.item() == pytest.approx(value, abs=1e-6)


def test_obvious_assignment() -> None:
    """Boxes go to the queries that stand on them, whatever the order."""
    boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4]])
    prediction = SetPrediction(torch.zeros(1, 3, 4), boxes[None])
    targets = targets_of([boxes[2].tolist(), boxes[0].tolist()])
    ((queries, matched),) = matcher()(prediction, targets)
    assert dict(zip(matched.tolist(), queries.tolist(), strict=True)) == {0: 2, 1: 0}


def test_class_decides_between_equal_boxes() -> None:
    prediction = SetPrediction(
        torch.tensor([[[5.0, -5.0], [-5.0, 5.0]]]), torch.full((1, 2, 4), 0.5)
    )
    targets = targets_of([[0.5] * 4, [0.5] * 4], labels=[[1, 0]])
    ((queries, matched),) = matcher()(prediction, targets)
    assert dict(zip(matched.tolist(), queries.tolist(), strict=True)) == {0: 1, 1: 0}


@pytest.mark.parametrize(("queries", "boxes"), [(5, 3), (4, 4), (3, 5), (6, 1)])
def test_no_assignment_is_cheaper(queries: int, boxes: int) -> None:
    """Against all permutations; with more boxes than queries, some boxes stay without one."""
    module = matcher()
    for _ in range(10):
        prediction, targets = random_prediction(1, queries), random_targets(boxes)
        cost = module.cost(prediction, targets)[0]
        ((rows, columns),) = module(prediction, targets)
        small = min(queries, boxes)
        assert len(rows) == len(set(rows.tolist())) == len(set(columns.tolist())) == small
        best = min(
            sum(cost[r, c].item() for r, c in zip(chosen_rows, chosen_columns, strict=True))
            for chosen_rows in itertools.permutations(range(queries), small)
            for chosen_columns in itertools.combinations(range(boxes), small)
        )
        assert cost[rows, columns].sum().item() == pytest.approx(best, abs=1e-5)


def test_a_batch_is_matched_image_by_image() -> None:
    prediction, targets = random_prediction(3, 7), random_targets(2, 0, 4)
    batched = matcher()(prediction, targets)
    for image in range(3):
        single = SetPrediction(prediction.logits[image][None], prediction.boxes[image][None])
        ((queries, boxes),) = matcher()(single, targets[image : image + 1])
        assert torch.equal(batched[image][0], queries)
        assert torch.equal(batched[image][1], boxes)
    assert [len(queries) for queries, _ in batched] == [2, 0, 4]


def test_no_boxes_at_all() -> None:
    matching = matcher()(random_prediction(2, 5), random_targets(0, 0))
    for queries, boxes in matching:
        assert queries.shape == boxes.shape == (0,)
        assert queries.dtype is boxes.dtype is torch.int64


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_predictions_must_be_finite(bad: float) -> None:
    prediction = random_prediction(2, 5)
    prediction.boxes[1, 3, 0] = bad
    with pytest.raises(NonFiniteLossError, match=r"not finite: lower optimizer.lr"):
        matcher()(prediction, random_targets(2, 1))
    nan_logits = random_prediction(1, 5)
    nan_logits.logits[0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        matcher()(nan_logits, targets_of([[0.5] * 4], labels=[[0]]))


def test_matching_has_no_gradient() -> None:
    prediction = SetPrediction(
        torch.randn(1, 5, 4, requires_grad=True), torch.rand(1, 5, 4, requires_grad=True)
    )
    ((queries, _),) = matcher()(prediction, random_targets(2))
    assert not queries.requires_grad


def test_softmax_class_cost() -> None:
    """Odds 1 : 3 : 4 of two classes and "no object": minus 1/8 and 3/8."""
    logits = torch.tensor([[0.0, math.log(3), math.log(4)], [math.log(2), 0.0, 0.0]])
    cost = SoftmaxClassCost()(logits, torch.tensor([1, 0, 1]))
    assert cost.shape == (2, 3)
    assert cost[0].tolist() == pytest.approx([-3 / 8, -1 / 8, -3 / 8])
    assert cost[1].tolist() == pytest.approx([-1 / 4, -1 / 2, -1 / 4])


def test_softmax_matching() -> None:
    """Of two queries on the box, the one that is surer of its class, whatever its logit."""
    module = HungarianMatcher(class_cost=SoftmaxClassCost(), class_weight=1.0)
    logits = torch.tensor([[[5.0, 0.0, 5.0], [2.0, 0.0, 0.0]]])
    prediction = SetPrediction(logits, torch.full((1, 2, 4), 0.5))
    ((queries, matched),) = module(prediction, targets_of([[0.5] * 4], labels=[[0]]))
    assert queries.tolist() == [1] and matched.tolist() == [0]
    cost = module.cost(prediction, targets_of([[0.5] * 4], labels=[[0]]))
    # The boxes agree: no distance, and the generalised IoU is 1.
    surest = math.exp(2) / (math.exp(2) + 2)
    assert cost[0, 1, 0].item() == pytest.approx(-surest - 2, rel=1e-5)
