"""The two interfaces that carry every attention type."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from efficient_detr.structures import FeatureTokens


class EncoderAttention(nn.Module):
    """Attention from encoder tokens to the tokens of all levels.

    Attributes:
        attends_whole_levels: the attention needs every token as a query, so that a layer with it
            cannot update a selection of tokens.
    """

    attends_whole_levels: ClassVar[bool] = False

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: FeatureTokens,
        padding_mask: Tensor,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, N, C) features of the attending tokens.
            position: (B, N, C) their position embeddings.
            reference_points: (B, N, L, 2) their centres (x, y), scaled by the valid ratios.
            memory: the tokens attended to.
            padding_mask: (B, N) bool, True on attending tokens that nobody reads.

        Returns:
            (B, N, C) without the residual.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


class DecoderAttention(nn.Module):
    """Cross-attention from decoder queries to the encoder's memory.

    Attributes:
        needs_references: the attention looks around reference points or boxes; queries (or the
            attention of the first layer) must provide them.
    """

    needs_references: ClassVar[bool] = False

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_boxes: Tensor | None,
        memory: FeatureTokens,
        layer_input: Tensor,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C) query features after self-attention.
            position: (B, Q, C) their position embeddings.
            reference_boxes: (B, Q, 4) boxes (cx, cy, w, h) or (B, Q, 2) points (x, y) in [0, 1] of
                the unpadded image; None if the queries have no references.
            memory: the tokens attended to.
            layer_input: (B, Q, C) queries with positions as they were before self-attention.

        Returns:
            (B, Q, C) without the residual.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def predict_reference_logits(self, layer_input: Tensor) -> Tensor | None:
        """Reference points (B, Q, 2) before the sigmoid, or None if the attention predicts none.

        Asked of the first layer if the queries come without references.
        """
        return None

    @property
    def predicts_references(self) -> bool:
        """Whether `predict_reference_logits` gives points."""
        return False
