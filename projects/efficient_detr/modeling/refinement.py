"""How a decoder turns what its heads read into boxes, and what it hands to the next layer.

A head predicts a correction in logit space. References are what it corrects: points or boxes that
the attention looks around. The three rules differ in which gradients they let pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from efficient_detr.boxes import inverse_sigmoid
from efficient_detr.modeling.heads import PredictionHead


@dataclass(frozen=True)
class References:
    """The references of a decoder layer.

    Attributes:
        attended: (B, Q, 4|2) boxes or points in [0, 1] that the layer looks around.
        logits: (B, Q, 4|2) what the layer's head corrects. The same in value, up to the bounds of
            the inverse sigmoid, but not always in gradient.
    """

    attended: Tensor
    logits: Tensor


class FixedReferences(nn.Module):
    """All layers start from the first references, if there are any (DETR, Deformable DETR, SMCA).

    Without references the head predicts the box itself.

    Args:
        eps: bound of values and their complements in the inverse sigmoid.
    """

    def __init__(self, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def start(self, boxes: Tensor) -> References:
        """References of the first layer from boxes or points (B, Q, 4|2)."""
        return References(boxes, inverse_sigmoid(boxes, self.eps))

    def forward(
        self, head: PredictionHead, content: Tensor, state: Tensor, references: References | None
    ) -> tuple[Tensor, References | None]:
        """Predict boxes after a layer.

        Args:
            head: the layer's head.
            content: (B, Q, C) what the layer returned.
            state: (B, Q, C) the same after the decoder's norm.
            references: those that the layer looked around, or None.

        Returns:
            boxes (B, Q, 4) in [0, 1] and the references of the next layer.
        """
        return corrected(head.regress(state), references), references


class IterativeRefinement(FixedReferences):
    """A layer hands its boxes to the next, without gradient (Deformable DETR, section 4.2).

    Args: as of `FixedReferences`.
    """

    def forward(
        self, head: PredictionHead, content: Tensor, state: Tensor, references: References | None
    ) -> tuple[Tensor, References | None]:
        """As in `FixedReferences`."""
        boxes = corrected(head.regress(state), references)
        return boxes, self.start(boxes.detach())


class LookForwardTwice(FixedReferences):
    """A box learns from the layer after it too (DINO, section 3.5).

    The next layer attends around what the head reads from the raw content, without gradient; its
    head corrects the same boxes with their gradient.

    Args:
        eps: as of `FixedReferences`; the published weights were trained with 1e-3.
    """

    def __init__(self, *, eps: float = 1e-3) -> None:
        super().__init__(eps=eps)

    def forward(
        self, head: PredictionHead, content: Tensor, state: Tensor, references: References | None
    ) -> tuple[Tensor, References | None]:
        """As in `FixedReferences`."""
        boxes = corrected(head.regress(state), references)
        attended = None if references is None else self.start(references.attended)
        following = corrected(head.regress(content), attended)
        return boxes, References(following.detach(), inverse_sigmoid(following, self.eps))


def corrected(correction: Tensor, references: References | None) -> Tensor:
    """Boxes (B, Q, 4) from corrections (B, Q, 4); points (B, Q, 2) only shift the centre."""
    if references is None:
        return correction.sigmoid()
    missing = correction.shape[-1] - references.logits.shape[-1]
    return (correction + F.pad(references.logits, (0, missing))).sigmoid()
