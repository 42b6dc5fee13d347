"""The distillation of boxes: reductions by hand, and who gets a gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.losses.distillation import (
    BoxDistillationLoss,
    MeanSquaredError,
    SummedDistance,
    SummedSquaredError,
)
from efficient_detr.structures import DecoderOutput, DetectorOutput
from tests.tiny_models import random_tokens


def decoded(boxes: Tensor) -> DecoderOutput:
    """Two layers, of which the first has other boxes."""
    boxes = torch.stack([torch.rand_like(boxes), boxes])
    return DecoderOutput(logits=torch.zeros(*boxes.shape[:3], 3), boxes=boxes)


def output_of(teacher: Tensor, student: Tensor) -> DetectorOutput:
    memory = random_tokens([(2, 2)])
    return DetectorOutput(decoder=decoded(teacher), memory=memory, student=decoded(student))


def boxes_of(offsets: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Boxes of a teacher and a student (1, 2, 4) with these differences."""
    teacher = torch.full((1, 2, 4), 0.4)
    return teacher, teacher + torch.tensor([offsets])


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        # Squares 0.09 + 0.16 and 0.01: together 0.26, over 8 numbers; lengths 0.5 and 0.1.
        (None, 0.26 / 8),
        (MeanSquaredError(), 0.26 / 8),
        (SummedSquaredError(), 0.26),
        (SummedDistance(), 0.6),
    ],
)
def test_reductions(distance: nn.Module | None, expected: float) -> None:
    teacher, student = boxes_of([[0.3, 0.0, 0.4, 0.0], [0.0, -0.1, 0.0, 0.0]])
    loss = BoxDistillationLoss(weight=3.0, distance=distance)
    terms = loss(output_of(teacher, student), [])
    assert list(terms) == ["loss_box_distillation"]
    assert float(terms["loss_box_distillation"]) == pytest.approx(3 * expected, rel=1e-5)


@pytest.mark.parametrize("distance", [MeanSquaredError(), SummedSquaredError(), SummedDistance()])
def test_only_the_student_learns(distance: nn.Module) -> None:
    teacher, student = boxes_of([[0.3, 0.0, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    teacher.requires_grad_()
    student.requires_grad_()
    BoxDistillationLoss(distance=distance)(output_of(teacher, student), [])[
        "loss_box_distillation"
    ].backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.isfinite().all()
    assert student.grad[0, 0, 0] > 0 and not student.grad[0, 1].any()


def test_a_detector_without_student() -> None:
    teacher, student = boxes_of([[0.0] * 4] * 2)
    output = dataclasses.replace(output_of(teacher, student), student=None)
    with pytest.raises(ConfigError, match="use DistillationDetector"):
        BoxDistillationLoss()(output, [])
