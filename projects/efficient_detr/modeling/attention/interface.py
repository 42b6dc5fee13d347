"""The two interfaces that carry every attention type."""

from __future__ import annotations

from torch import Tensor, nn

from efficient_detr.structures import FeatureTokens


class EncoderAttention(nn.Module):
    """Attention from encoder tokens to the tokens of all levels."""

    def forward(
        self, query: Tensor, position: Tensor, reference_points: Tensor, memory: FeatureTokens
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, N, C) features of the attending tokens.
            position: (B, N, C) their position embeddings.
            reference_points: (B, N, L, 2) their centres (x, y), scaled by the valid ratios.
            memory: the tokens attended to.

        Returns:
            (B, N, C) without the residual.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


class DecoderAttention(nn.Module):
    """Cross-attention from decoder queries to the encoder's memory."""

    def forward(
        self, query: Tensor, position: Tensor, reference_boxes: Tensor, memory: FeatureTokens
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C) query features.
            position: (B, Q, C) their position embeddings.
            reference_boxes: (B, Q, 4) boxes (cx, cy, w, h) in [0, 1] of the unpadded image.
            memory: the tokens attended to.

        Returns:
            (B, Q, C) without the residual.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")
