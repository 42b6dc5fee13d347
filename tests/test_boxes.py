"""Box arithmetic against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from efficient_detr.boxes import (
    box_area,
    cxcywh_to_xyxy,
    generalized_iou,
    inverse_sigmoid,
    xyxy_to_cxcywh,
)


def test_order_of_coordinates() -> None:
    """A wide box: the third number is its width, the fourth its height."""
    wide = torch.tensor([[10.0, 20.0, 8.0, 2.0]])
    assert cxcywh_to_xyxy(wide).tolist() == [[6.0, 19.0, 14.0, 21.0]]
    assert xyxy_to_cxcywh(torch.tensor([[6.0, 19.0, 14.0, 21.0]])).tolist() == wide.tolist()


def test_conversions_are_inverse() -> None:
    boxes = torch.rand(5, 7, 4)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)
    assert cxcywh_to_xyxy(torch.zeros(0, 4)).shape == (0, 4)


def test_area() -> None:
    assert box_area(torch.tensor([[1.0, 2.0, 4.0, 7.0], [3.0, 3.0, 3.0, 9.0]])).tolist() == [15, 0]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # the same box: union = hull = intersection
        ([0, 0, 2, 2], [0, 0, 2, 2], 1.0),
        # intersection 1 x 1, union 4 + 4 - 1 = 7, hull 3 x 3 = 9: 1/7 - 2/9
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7 - 2 / 9),
        # nested: intersection 1, union = hull = 16
        ([0, 0, 4, 4], [1, 1, 2, 2], 1 / 16),
        # side by side, touching: union = hull = 2
        ([0, 0, 1, 1], [1, 0, 2, 1], 0.0),
        # disjoint: union 2, hull 5 x 1: 0 - 3/5
        ([0, 0, 1, 1], [4, 0, 5, 1], -3 / 5),
        # apart along both axes: intersection is no product of two negative sides; hull 9, union 2
        ([0, 0, 1, 1], [2, 2, 3, 3], -7 / 9),
        # a box without area inside another: union = hull = 4
        ([0, 0, 2, 2], [1, 1, 1, 1], 0.0),
        # a line and a box: union 1, hull 3 x 1
        ([0, 0, 1, 1], [3, 0, 3, 1], -2 / 3),
        # two points at one place, and two points apart (hull 1 x 1, union 0)
        ([1, 1, 1, 1], [1, 1, 1, 1], 0.0),
        ([0, 0, 0, 0], [1, 1, 1, 1], -1.0),
    ],
)
def test_generalized_iou(first: list[float], second: list[float], expected: float) -> None:
    a, b = torch.tensor([first]).float(), torch.tensor([second]).float()
    assert generalized_iou(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert generalized_iou(b, a).item() == pytest.approx(expected, abs=1e-6)


def test_generalized_iou_of_all_pairs() -> None:
    a = cxcywh_to_xyxy(torch.rand(3, 4))
    b = cxcywh_to_xyxy(torch.rand(5, 4))
    pairs = generalized_iou(a[:, None], b[None])
    assert pairs.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            torch.testing.assert_close(pairs[i, j], generalized_iou(a[i], b[j]))
    assert generalized_iou(a[:, None], b[None, :0]).shape == (3, 0)


def test_generalized_iou_has_finite_gradients_for_empty_boxes() -> None:
    boxes = torch.tensor([[1.0, 1, 1, 1], [0, 0, 2, 2]], requires_grad=True)
    generalized_iou(boxes, torch.tensor([[1.0, 1, 1, 1], [0, 0, 2, 2]])).sum().backward()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


def test_inverse_sigmoid_undoes_the_sigmoid() -> None:
    logits = torch.linspace(-6, 6, 13)
    torch.testing.assert_close(inverse_sigmoid(logits.sigmoid()), logits, atol=1e-4, rtol=0)


def test_inverse_sigmoid_is_bounded() -> None:
    """The value and its complement are bounded apart from each other, each by 1e-3.

    So 0 becomes log(1e-3 / 1), not logit(1e-3), which would be log(1e-3 / 0.999).
    """
    limit = math.log(1e-3)
    values = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    assert values.tolist() == pytest.approx([limit, limit, -limit, -limit], abs=1e-5)
    assert inverse_sigmoid(torch.tensor(5e-4)).item() == pytest.approx(
        math.log(1e-3 / (1 - 5e-4)), abs=1e-5
    )
    assert inverse_sigmoid(torch.tensor(0.0), eps=1e-5).item() == pytest.approx(math.log(1e-5))
