"""Focus-DETR's multi-category score (section 3.3): how likely a token belongs to an object.

The paper multiplies probabilities; the released code, and so every published checkpoint,
multiplies raw logits.
"""

from __future__ import annotations

from torch import Tensor, nn


class ObjectScore(nn.Module):
    """Interface: combine class logits and foreground logits into one ranking."""

    def forward(self, class_logits: Tensor, foreground_logits: Tensor) -> Tensor:
        """Score tokens.

        Args:
            class_logits: (B, N, K).
            foreground_logits: (B, N).

        Returns:
            (B, N), higher for tokens that are to enhance each other.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


class LogitProductScore(ObjectScore):
    """Highest class logit times foreground logit, as in the released code.

    Two negative logits give a positive score, so this does not rise with either logit; the
    published weights were trained with it.
    """

    def forward(self, class_logits: Tensor, foreground_logits: Tensor) -> Tensor:
        """See `ObjectScore`; values are unbounded."""
        return class_logits.amax(-1) * foreground_logits


class ProbabilityProductScore(ObjectScore):
    """Highest class probability times foreground probability, as in the paper (equation 5)."""

    def forward(self, class_logits: Tensor, foreground_logits: Tensor) -> Tensor:
        """See `ObjectScore`; values are in (0, 1)."""
        return class_logits.amax(-1).sigmoid() * foreground_logits.sigmoid()
