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
        attended = self.attend(active, memory)
        features = self.attention_norm(active.features + self.dropout(attended))
        return self.feedforward_norm(features + self.dropout(self.feedforward(features)))

    def attend(self, active: ActiveTokens, memory: FeatureTokens) -> Tensor:
        """What the attention adds to the active tokens (B, N, C)."""
        return self.attention(
            active.features,
            active.positions,
            active.reference_points,
            memory,
            active.padding_mask,
        )


class PreNormEncoderLayer(EncoderLayer):
    """The same parts with the norms before the branches, so that the residual stays un-normed.

    The tokens attended to are normed too. Such an encoder ends with a norm of its own.
    """

    def forward(self, active: ActiveTokens, memory: FeatureTokens) -> Tensor:
        """As in `EncoderLayer`."""
        normed = dataclasses.replace(active, features=self.attention_norm(active.features))
        normed_memory = memory.with_features(self.attention_norm(memory.features))
        features = active.features + self.dropout(self.attend(normed, normed_memory))
        return features + self.dropout(self.feedforward(self.feedforward_norm(features)))


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


class RegatheredTokens:
    """Each layer takes its tokens from the memory that the layer before left (Focus-DETR)."""

    def __call__(
        self, memory: FeatureTokens, indices: Tensor, counts: Tensor, previous: Tensor | None
    ) -> ActiveTokens:
        """Choose the tokens of a layer.

        Args:
            memory: the tokens before the layer.
            indices: (B, N) tokens of the layer.
            counts: (B,) rows of each image that belong to it.
            previous: (B, N', C) what the layer before returned, or None before the first.
        """
        return memory.gather(indices, counts)


class CarriedTokens(RegatheredTokens):
    """Each layer takes what the layer before returned (Sparse DETR).

    It differs from `RegatheredTokens` on the rows that fill up an image with fewer tokens: they are
    never written to the memory but go on from layer to layer.
    """

    def __call__(
        self, memory: FeatureTokens, indices: Tensor, counts: Tensor, previous: Tensor | None
    ) -> ActiveTokens:
        """As in `RegatheredTokens`."""
        active = super().__call__(memory, indices, counts, previous)
        if previous is None:
            return active
        # A selection may shrink from layer to layer; it keeps the leading rows.
        return dataclasses.replace(active, features=previous[:, : indices.shape[1]])


class TransformerEncoder(nn.Module):
    """A stack of encoder layers over all tokens or over the tokens of a selection.

    Args:
        layers: the layers, in order; they may differ.
        norm: norm of all tokens after the last layer, for pre-norm layers; or None.
        value_source: says which tokens a layer attends to.
        token_source: says where a layer of a selection takes its tokens from.
        object_score: ranking for layers with object self-attention, or None.
    """

    def __init__(
        self,
        *,
        layers: Sequence[nn.Module],
        norm: nn.Module | None = None,
        value_source: CurrentValues | InitialValues | None = None,
        token_source: RegatheredTokens | None = None,
        object_score: ObjectScore | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.value_source = value_source or CurrentValues()
        self.token_source = token_source or RegatheredTokens()
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
        if selection is None:
            encoded = EncoderOutput(self._update_all(tokens))
        else:
            encoded = self._update_selected(tokens, selection, head)
        if self.norm is None:
            return encoded
        memory = encoded.memory.with_features(self.norm(encoded.memory.features))
        return dataclasses.replace(encoded, memory=memory)

    def _update_all(self, tokens: FeatureTokens) -> FeatureTokens:
        memory = tokens
        for layer in self.layers:
            values = self.value_source(tokens, memory)
            memory = memory.with_features(layer(memory.all_active(), values))
        return memory

    def _update_selected(
        self, tokens: FeatureTokens, selection: TokenSelection, head: PredictionHead | None
    ) -> EncoderOutput:
        memory, features, states = tokens, None, []
        for layer, indices in zip(self.layers, selection.indices, strict=True):
            values = self.value_source(tokens, memory)
            active = self.token_source(memory, indices, selection.counts, features)
            features = layer(self._scored(active, selection, indices, head), values)
            memory = memory.scatter(indices, features, selection.counts)
            states.append(features)
        return EncoderOutput(memory, selection, states)

    def _scored(
        self,
        active: ActiveTokens,
        selection: TokenSelection,
        indices: Tensor,
        head: PredictionHead | None,
    ) -> ActiveTokens:
        foreground = gather_tokens(selection.scores, indices)
        if self.object_score is None or head is None:
            return dataclasses.replace(active, foreground_logits=foreground)
        scores = self.object_score(head.classify(active.features), foreground)
        return dataclasses.replace(active, foreground_logits=foreground, object_scores=scores)
