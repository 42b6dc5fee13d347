"""The encoder: layers that update all tokens, or only those that a selection keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.interface import EncoderAttention
from efficient_detr.modeling.attention.object import ObjectSelfAttention
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.selection.object_score import ObjectScore
from efficient_detr.structures import (
    ActiveTokens,
    EncoderOutput,
    FeatureTokens,
    TokenSelection,
    gather_tokens,
)


class EncoderLayer(nn.Module):
    """Attention and feed-forward network, each with residual and then norm (post-norm).

    Args:
        attention: any encoder attention.
        feedforward: the position-wise network.
        channels: C.
        dropout: probability on both branches before the residual.
    """

    def __init__(
        self,
        *,
        attention: EncoderAttention,
        feedforward: FeedForward,
        channels: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(channels)
        self.feedforward = feedforward
        self.feedforward_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, active: ActiveTokens, memory: FeatureTokens) -> Tensor:
        """Update the active tokens by looking at `memory`; returns their features (B, N, C)."""
        features = active.features
        attended = self.attention(features, active.positions, active.reference_points, memory)
        features = self.attention_norm(features + self.dropout(attended))
        return self.feedforward_norm(features + self.dropout(self.feedforward(features)))


class DualAttentionEncoderLayer(EncoderLayer):
    """Focus-DETR's layer: object tokens enhance each other before an ordinary layer (Figure 5).

    Args:
        object_attention: self-attention over the tokens with the highest object scores.
        attention: as in `EncoderLayer`; likewise the rest.
    """

    def __init__(
        self,
        *,
        object_attention: ObjectSelfAttention,
        attention: EncoderAttention,
        feedforward: FeedForward,
        channels: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            attention=attention, feedforward=feedforward, channels=channels, dropout=dropout
        )
        self.object_attention = object_attention

    def forward(self, active: ActiveTokens, memory: FeatureTokens) -> Tensor:
        """As in `EncoderLayer`; `active` must carry object scores."""
        if active.object_scores is None:
            raise ConfigError(
                "DualAttentionEncoderLayer needs object scores: "
                "give the encoder an object_score and the detector a foreground selection"
            )
        enhanced = self.object_attention(active.features, active.positions, active.object_scores)
        return super().forward(dataclasses.replace(active, features=enhanced), memory)


class CurrentValues:
    """Layers attend to the tokens as the layers before left them (DETR, the Focus-DETR paper)."""

    def __call__(self, initial: FeatureTokens, current: FeatureTokens) -> FeatureTokens:
        """Choose the tokens attended to, given those before the first and before this layer."""
        return current


class InitialValues:
    """All layers attend to the neck's tokens, as the published Focus-DETR weights expect."""

    def __call__(self, initial: FeatureTokens, current: FeatureTokens) -> FeatureTokens:
        """Choose the tokens attended to, given those before the first and before this layer."""
        return initial


class TransformerEncoder(nn.Module):
    """A stack of encoder layers over all tokens or over the tokens of a selection.

    Args:
        layers: the layers, in order; they may differ.
        value_source: says which tokens a layer attends to.
        object_score: ranking for layers with object self-attention, or None.
    """

    def __init__(
        self,
        *,
        layers: Sequence[nn.Module],
        value_source: CurrentValues | InitialValues | None = None,
        object_score: ObjectScore | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.value_source = value_source or CurrentValues()
        self.object_score = object_score

    def forward(
        self, tokens: FeatureTokens, selection: TokenSelection | None, head: PredictionHead | None
    ) -> EncoderOutput:
        """Refine the tokens.

        Args:
            tokens: the tokens from the neck.
            selection: which tokens each layer updates, or None for all.
            head: prediction head of the proposals, which classifies tokens for the object score.
        """
        memory = tokens
        for index, layer in enumerate(self.layers):
            values = self.value_source(tokens, memory)
            if selection is None:
                memory = memory.with_features(layer(memory.all_active(), values))
            else:
                active = self._active_tokens(memory, selection, index, head)
                features = layer(active, values)
                memory = memory.scatter(selection.indices[index], features, selection.counts)
        return EncoderOutput(memory, selection)

    def _active_tokens(
        self,
        memory: FeatureTokens,
        selection: TokenSelection,
        index: int,
        head: PredictionHead | None,
    ) -> ActiveTokens:
        indices = selection.indices[index]
        active = memory.gather(indices)
        foreground = gather_tokens(selection.scores, indices)
        if self.object_score is None or head is None:
            return dataclasses.replace(active, foreground_logits=foreground)
        scores = self.object_score(head.classify(active.features), foreground)
        return dataclasses.replace(active, foreground_logits=foreground, object_scores=scores)
