"""Logits and boxes -> instances."""

from __future__ import annotations

import math

import pytest
import torch

from efficient_detr.postprocessing import (
    Postprocessor,
    SigmoidTopK,
    SoftmaxBestClass,
    to_instances,
)
from efficient_detr.structures import SetPrediction
from tests.tiny_models import logit


def test_best_pairs_of_query_and_class() -> None:
    """Two queries, three classes: the best three of six pairs, query 0 appearing twice."""
    probabilities = [[0.9, 0.1, 0.6], [0.2, 0.7, 0.3]]
    logits = torch.tensor([[[logit(p) for p in row] for row in probabilities]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 0.5], [0.25, 0.5, 0.1, 0.2]]])
    (result,) = SigmoidTopK(num_detections=3)(SetPrediction(logits, boxes), [(100, 200)])
    assert result.image_size == (100, 200)
    assert result.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert result.pred_classes.tolist() == [0, 1, 2]
    # x scales by the width 200, y by the height 100.
    whole, small = [0, 25, 200, 75], [40, 40, 60, 60]
    expected = torch.tensor([whole, small, whole]).float()
    torch.testing.assert_close(result.pred_boxes.tensor, expected)


def test_every_image_is_scaled_by_its_own_size() -> None:
    prediction = SetPrediction(torch.zeros(2, 1, 1), torch.full((2, 1, 4), 0.5))
    first, second = SigmoidTopK()(prediction, [(40, 80), (100, 20)])
    assert first.pred_boxes.tensor.tolist() == [[20, 10, 60, 30]]
    assert second.pred_boxes.tensor.tolist() == [[5, 25, 15, 75]]


@pytest.mark.parametrize(("queries", "classes"), [(4, 5), (1, 1), (2, 91)])
def test_fewer_pairs_than_detections(queries: int, classes: int) -> None:
    prediction = SetPrediction(torch.randn(1, queries, classes), torch.rand(1, queries, 4))
    (result,) = SigmoidTopK(num_detections=300)(prediction, [(10, 10)])
    assert len(result) == queries * classes
    pairs = {
        (box, int(label))
        for box, label in zip(
            map(tuple, result.pred_boxes.tensor.tolist()), result.pred_classes, strict=True
        )
    }
    assert len(pairs) == queries * classes, "each pair appears once"
    assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)


def test_the_predictions_are_left_alone() -> None:
    boxes = torch.rand(3, 4)
    before = boxes.clone()
    to_instances(boxes, torch.rand(3), torch.zeros(3).long(), (50, 60))
    SigmoidTopK()(SetPrediction(torch.zeros(1, 3, 1), boxes[None]), [(50, 60)])
    assert torch.equal(boxes, before)


def test_best_class_of_every_query() -> None:
    """Odds of two classes and "no object"; queries keep their order and none is dropped.

    Query 0: 1 : 3 : 4, class 1 with 3/8 although "no object" has 4/8. Query 1: 6 : 1 : 1.
    """
    logits = torch.tensor([[[1.0, 3, 4], [6, 1, 1]]]).log()
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 0.5], [0.25, 0.5, 0.1, 0.2]]])
    (result,) = SoftmaxBestClass()(SetPrediction(logits, boxes), [(100, 200)])
    assert result.scores.tolist() == pytest.approx([3 / 8, 6 / 8])
    assert result.pred_classes.tolist() == [1, 0]
    expected = torch.tensor([[0.0, 25, 200, 75], [40, 40, 60, 60]])
    torch.testing.assert_close(result.pred_boxes.tensor, expected)


def test_best_classes_of_a_batch() -> None:
    """The logits' common offset does not matter: a softmax has none."""
    logits = torch.tensor([[[0.0, math.log(3)]], [[math.log(9), 0.0]]]) + 50
    prediction = SetPrediction(logits, torch.full((2, 1, 4), 0.5))
    first, second = SoftmaxBestClass()(prediction, [(40, 80), (100, 20)])
    assert first.scores.tolist() == pytest.approx([0.25], rel=1e-4)
    assert second.scores.tolist() == pytest.approx([0.9], rel=1e-4)
    assert first.pred_boxes.tensor.tolist() == [[20, 10, 60, 30]]
    assert second.image_size == (100, 20)


def test_select_is_abstract() -> None:
    class Unfinished(Postprocessor):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished does not define select"):
        Unfinished()(SetPrediction(torch.zeros(1, 1, 1), torch.zeros(1, 1, 4)), [(1, 1)])
