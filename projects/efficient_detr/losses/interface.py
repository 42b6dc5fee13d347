"""What every loss of the detector offers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from efficient_detr.modeling.detector import Detector
from efficient_detr.structures import DetectorOutput, Targets


class DetectorLoss(nn.Module):
    """Terms of the training loss from the detector's output.

    Attributes:
        supervises_selection: the loss trains the scores of `detector.selection`.
        supervises_student: the loss trains the student of a `DistillationDetector`.
    """

    supervises_selection: ClassVar[bool] = False
    supervises_student: ClassVar[bool] = False

    def check_detector(self, detector: Detector) -> None:
        """Refuse, when the model is built, a detector that does not give what the loss needs.

        Raises:
            ConfigError: naming the loss and the part of the detector.
        """

    def forward(self, output: DetectorOutput, targets: list[Targets]) -> dict[str, Tensor]:
        """Weighted terms by name, to be added up.

        Args:
            output: what the detector predicts for B images.
            targets: their ground truth.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")
