"""The decoder: queries look at each other and at the memory, and predict after every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.deformable import DeformableDecoderAttention
from efficient_detr.modeling.attention.dense import SelfAttention
from efficient_detr.modeling.attention.interface import DecoderAttention
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import MLP, FeedForward
from efficient_detr.modeling.position import BoxPositionEmbedding
from efficient_detr.modeling.refinement import FixedReferences, References
from efficient_detr.structures import DecoderOutput, FeatureTokens, Queries


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward network, each with residual, then norm.

    Args:
        self_attention: dense attention among the queries.
        cross_attention: any decoder attention.
        feedforward: the position-wise network.
        channels: C.
        dropout: probability on each branch before the residual.
    """

    def __init__(
        self,
        *,
        self_attention: SelfAttention,
        cross_attention: DecoderAttention,
        feedforward: FeedForward,
        channels: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.self_attention_norm = nn.LayerNorm(channels)
        self.cross_attention = cross_attention
        self.cross_attention_norm = nn.LayerNorm(channels)
        self.feedforward = feedforward
        self.feedforward_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_boxes: Tensor | None,
        memory: FeatureTokens,
        attention_mask: Tensor | None = None,
        token_attention: list[Tensor] | None = None,
    ) -> Tensor:
        """Update the queries.

        Args:
            query: (B, Q, C) query features.
            position: (B, Q, C) query positions.
            reference_boxes: (B, Q, 4|2) boxes or points in [0, 1], or None.
            memory: the encoder's tokens.
            attention_mask: (Q, Q) bool, True where self-attention is blocked, or None.
            token_attention: a list to which the attention that each token gets (B, S) is appended,
                or None not to compute it.

        Returns:
            (B, Q, C).
        """
        layer_input = query + position
        attended = self.self_attention(query, position, attention_mask)
        query = self.self_attention_norm(query + self.dropout(attended))
        self._map(query, position, reference_boxes, memory, token_attention)
        attended = self.cross_attention(query, position, reference_boxes, memory, layer_input)
        query = self.cross_attention_norm(query + self.dropout(attended))
        return self.feedforward_norm(query + self.dropout(self.feedforward(query)))

    def _map(
        self,
        query: Tensor,
        position: Tensor,
        reference_boxes: Tensor | None,
        memory: FeatureTokens,
        token_attention: list[Tensor] | None,
    ) -> None:
        if token_attention is not None:
            attention = cast(DeformableDecoderAttention, self.cross_attention)
            token_attention.append(
                attention.token_attention(query, position, reference_boxes, memory)
            )


class PreNormDecoderLayer(DecoderLayer):
    """The same parts with the norms before the branches, so that the residual stays un-normed."""

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_boxes: Tensor | None,
        memory: FeatureTokens,
        attention_mask: Tensor | None = None,
        token_attention: list[Tensor] | None = None,
    ) -> Tensor:
        """As in `DecoderLayer`."""
        layer_input = query + position
        normed = self.self_attention_norm(query)
        query = query + self.dropout(self.self_attention(normed, position, attention_mask))
        normed = self.cross_attention_norm(query)
        self._map(normed, position, reference_boxes, memory, token_attention)
        attended = self.cross_attention(normed, position, reference_boxes, memory, layer_input)
        query = query + self.dropout(attended)
        return query + self.dropout(self.feedforward(self.feedforward_norm(query)))


class StoredQueryPosition(nn.Module):
    """Every layer uses the positions that the queries came with."""

    needs_references = False

    def forward(
        self, queries: Queries, reference_boxes: Tensor | None, memory: FeatureTokens
    ) -> Tensor:
        """Positions (B, Q, C)."""
        if queries.position is None:
            raise ConfigError(
                "StoredQueryPosition needs queries with positions: use detector.queries that give "
                "them, or BoxQueryPosition as decoder.query_position"
            )
        return queries.position


class BoxQueryPosition(nn.Module):
    """Query positions from reference boxes: sine embedding, then a two-layer network (DINO).

    Args:
        channels: C.
        temperature: ratio of the longest to the shortest wavelength of the embedding.
    """

    needs_references = True

    def __init__(self, *, channels: int, temperature: float = 10000.0) -> None:
        super().__init__()
        self.embedding = BoxPositionEmbedding(channels=channels, temperature=temperature)
        self.projection = MLP(sizes=[2 * channels, channels, channels])
        for parameter in self.projection.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, queries: Queries, reference_boxes: Tensor | None, memory: FeatureTokens
    ) -> Tensor:
        """Positions (B, Q, C) of boxes (B, Q, 4), seen from the finest level's padded frame.

        Raises:
            ConfigError: if the queries have no reference boxes.
        """
        if reference_boxes is None or reference_boxes.shape[-1] != 4:
            raise ConfigError(
                "BoxQueryPosition needs reference boxes (cx, cy, w, h): use two-stage "
                "detector.queries, or StoredQueryPosition as decoder.query_position"
            )
        ratio = memory.valid_ratios[:, :1].repeat(1, 1, 2)  # (B, 1, 4)
        return self.projection(self.embedding(reference_boxes * ratio))


class TransformerDecoder(nn.Module):
    """A stack of decoder layers with prediction heads.

    Args:
        layers: the layers, in order; they may differ.
        heads: a prediction head for each layer, or a single one that all layers share.
        query_position: where the positions of the queries come from.
        refinement: how boxes follow from what the heads read.
        norm: norm of the features that the heads read (the next layer gets them without), or None.
        map_token_attention: sum up in training how much attention each token of the memory gets,
            which `TokenAttentionLoss` needs; the cross-attention of all layers must be deformable.
    """

    def __init__(
        self,
        *,
        layers: Sequence[DecoderLayer],
        heads: Sequence[PredictionHead],
        query_position: BoxQueryPosition | StoredQueryPosition,
        refinement: FixedReferences | None = None,
        norm: nn.Module | None = None,
        map_token_attention: bool = False,
    ) -> None:
        super().__init__()
        if len(heads) not in (1, len(layers)):
            raise ConfigError(
                f"decoder.heads has {len(heads)} entries for {len(layers)} decoder.layers: give "
                "one for each layer or a single one for all"
            )
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ModuleList(heads)
        self.query_position = query_position
        self.refinement = refinement or FixedReferences()
        self.norm = norm
        self.map_token_attention = map_token_attention
        _check_mapped(layers, map_token_attention)

    def forward(self, queries: Queries, memory: FeatureTokens) -> DecoderOutput:
        """Predict after every layer, denoising queries included."""
        content, references = queries.content, self._first_references(queries, memory)
        maps: list[Tensor] | None = [] if self.map_token_attention and self.training else None
        logits, boxes, handed_on = [], [], []
        for index, layer in enumerate(self.layers):
            attended = None if references is None else references.attended
            position = self.query_position(queries, attended, memory)
            mask = queries.attention_mask
            content = layer(content, position, attended, memory, mask, maps)
            state = content if self.norm is None else self.norm(content)
            head = self.head(index)
            predicted, references = self.refinement(head, content, state, references)
            logits.append(head.classify(state))
            boxes.append(predicted)
            handed_on.append(references)
        return DecoderOutput(
            logits=torch.stack(logits),
            boxes=torch.stack(boxes),
            references=_stacked(handed_on),
            token_attention=None if maps is None else torch.stack(maps).sum(0),
        )

    def head(self, layer: int) -> PredictionHead:
        """The prediction head of a layer."""
        return cast(PredictionHead, self.heads[min(layer, len(self.heads) - 1)])

    def _first_references(self, queries: Queries, memory: FeatureTokens) -> References | None:
        """Those of the queries, or else what the first layer's attention predicts."""
        if queries.reference_boxes is not None:
            return self.refinement.start(queries.reference_boxes)
        first = cast(DecoderLayer, self.layers[0]).cross_attention
        if not first.predicts_references:
            return None
        position = self.query_position(queries, None, memory)
        logits = first.predict_reference_logits(queries.content + position)
        return None if logits is None else References(logits.sigmoid(), logits)


def _stacked(references: Sequence[References | None]) -> Tensor | None:
    """(layers, B, Q, 4|2), or None."""
    values = [reference.attended for reference in references if reference is not None]
    return torch.stack(values) if values else None


def _check_mapped(layers: Sequence[DecoderLayer], map_token_attention: bool) -> None:
    for index, layer in enumerate(layers):
        attention = layer.cross_attention
        if map_token_attention and not isinstance(attention, DeformableDecoderAttention):
            raise ConfigError(
                f"decoder.map_token_attention needs deformable cross-attention, but "
                f"decoder.layers.{index} has {type(attention).__name__}: use "
                "DeformableDecoderAttention or set map_token_attention=False"
            )
