"""Multi-task knowledge distillation: dense attention teaches clustered attention (ACT).

One set of weights detects twice on the same features: with dense attention as the teacher, which
learns from the ground truth, and with clustered attention as the student, whose boxes are drawn
towards the teacher's (`efficient_detr.losses.distillation`). So the weights serve both ways.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.clustered import clustered_attentions, exact_attention
from efficient_detr.modeling.detector import Detector
from efficient_detr.structures import DetectorOutput, Targets


class DistillationDetector(Detector):
    """A detector that, given targets, detects with dense and with clustered attention.

    Backbone, neck and tokenizer run once, and both passes send gradients into them. In training,
    dropout draws other masks for the student than for the teacher, so their boxes differ even where
    clustering changes nothing.

    Args: as of `Detector`.

    Raises:
        ConfigError: if no attention is clustered, or if queries are selected among proposals: the
            student may select others, and boxes are compared query by query.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        if not clustered_attentions(self):
            raise ConfigError(
                f"DistillationDetector needs clustered attention to teach, but detector.encoder "
                f"({type(self.encoder).__name__}) has none: use ClusteredEncoderAttention or "
                "Detector"
            )
        if self.queries.needs_proposals:
            raise ConfigError(
                "DistillationDetector compares boxes query by query, but detector.queries "
                f"({type(self.queries).__name__}) selects other proposals for the student than for "
                "the teacher: use learned queries"
            )

    def forward(
        self, images: Tensor, padding_mask: Tensor, targets: list[Targets] | None = None
    ) -> DetectorOutput:
        """Detect; arguments as of `Detector`.

        Returns:
            With targets the teacher's output, with the student's in `student`; without targets, so
            in inference, that of clustered attention alone.
        """
        tokens = self.tokenize(images, padding_mask)
        if targets is None:
            return self.detect(tokens)
        with exact_attention(self):
            teacher = self.detect(tokens, targets)
        # Without targets: denoising queries belong to the teacher's loss alone.
        return dataclasses.replace(teacher, student=self.detect(tokens).decoder)
