"""The box term of multi-task knowledge distillation, as the ACT paper proposes it.

The publication calls it an L2 distance between the boxes of clustered and of dense attention, and
leaves open how it is reduced to a number; each reading is a class of its own.
"""

from __future__ import annotations

from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.losses.interface import DetectorLoss
from efficient_detr.modeling.detector import Detector
from efficient_detr.modeling.distillation import DistillationDetector
from efficient_detr.structures import DetectorOutput, Targets

NO_STUDENT = (
    "BoxDistillationLoss compares a student with its teacher, but model.detector gives no student: "
    "use DistillationDetector or remove the loss from model.losses"
)


class MeanSquaredError(nn.Module):
    """Mean over images, queries and coordinates of the squared difference."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Reduce boxes (B, Q, 4) of both to a scalar."""
        return (student - teacher).square().mean()


class SummedSquaredError(nn.Module):
    """Sum over images, queries and coordinates of the squared difference."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Reduce boxes (B, Q, 4) of both to a scalar."""
        return (student - teacher).square().sum()


class SummedDistance(nn.Module):
    """Sum over images and queries of the Euclidean distance of (cx, cy, w, h)."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Reduce boxes (B, Q, 4) of both to a scalar; equal boxes have gradient zero."""
        return (student - teacher).norm(dim=-1).sum()


class BoxDistillationLoss(DetectorLoss):
    """`loss_box_distillation`: how far the student's boxes are from the teacher's.

    Boxes of the last decoder layer are compared query by query, without matching. The teacher's
    are targets and get no gradient. Classes are not distilled, as in the paper.

    Args:
        weight: factor of the loss.
        distance: boxes (B, Q, 4) of student and teacher -> scalar; None for `MeanSquaredError`.
    """

    supervises_student = True

    def __init__(self, *, weight: float = 1.0, distance: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.distance = MeanSquaredError() if distance is None else distance

    def check_detector(self, detector: Detector) -> None:
        """Refuse a detector without student."""
        if not isinstance(detector, DistillationDetector):
            raise ConfigError(NO_STUDENT)

    def forward(self, output: DetectorOutput, targets: list[Targets]) -> dict[str, Tensor]:
        """The named term.

        Raises:
            ConfigError: if the detector has no student.
        """
        if output.student is None:
            raise ConfigError(NO_STUDENT)
        teacher = output.prediction.boxes.detach()
        distance = self.distance(output.student.layer(-1).boxes, teacher)
        return {"loss_box_distillation": self.weight * distance}
