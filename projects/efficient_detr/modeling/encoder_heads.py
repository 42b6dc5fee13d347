"""Predictions from the encoder's layers, to supervise what a sparse encoder learns.

Sparse DETR (section 3.4, "encoder auxiliary loss"): as an encoder layer updates few tokens, each
can afford to predict a class and a box of its own. They exist for the loss alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.queries.proposals import ProposalHead
from efficient_detr.modeling.selection import TokenSelector
from efficient_detr.structures import EncoderOutput, FeatureTokens, SetPrediction, gather_tokens


class EncoderLayerHeads(nn.Module):
    """A prediction head for every encoder layer but the last, whose tokens make the proposals.

    Args:
        heads: one head for each encoder layer but the last.
    """

    def __init__(self, *, heads: Sequence[PredictionHead]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def check_selection(self, selection: TokenSelector | None) -> None:
        """Refuse a selection that the heads do not fit.

        Args:
            selection: the detector's token selection, which knows the encoder's layers, or None.

        Raises:
            ConfigError: if there is no selection, or not one head for each layer but the last.
        """
        if selection is None:
            raise ConfigError(
                "detector.encoder_heads (EncoderLayerHeads) predicts from the tokens of a "
                "selection: set detector.selection or remove encoder_heads"
            )
        num_layers = len(selection.layer_keep_ratios)
        if len(self.heads) != num_layers - 1:
            raise ConfigError(
                f"detector.encoder_heads has {len(self.heads)} heads for {num_layers} "
                f"encoder.layers: give {num_layers - 1}, one for each layer but the last"
            )

    def forward(
        self, encoded: EncoderOutput, proposals: ProposalHead, tokens: FeatureTokens
    ) -> list[SetPrediction]:
        """Predict from the tokens that each layer but the last updated.

        Rows that fill up the selection of a smaller image predict as well, as published.

        Args:
            encoded: the encoder's output, with a selection.
            proposals: gives the box around each token that the heads refine.
            tokens: the layout of the tokens.

        Returns:
            For each layer but the last (B, N_i, K) class logits and (B, N_i, 4) boxes.

        Raises:
            ConfigError: if the encoder updated all tokens.
        """
        if encoded.selection is None:
            raise ConfigError(
                "EncoderLayerHeads predicts from the tokens of a selection: "
                "set detector.selection or remove encoder_heads"
            )
        anchors = proposals.anchor_logits(tokens)  # (B, S, 4)
        heads = cast(Iterable[PredictionHead], self.heads)
        layers = zip(heads, encoded.layer_features, encoded.selection.indices, strict=False)
        return [
            SetPrediction(
                head.classify(features),
                (head.regress(features) + gather_tokens(anchors, indices)).sigmoid(),
            )
            for head, features, indices in layers
        ]
