"""The decoder: queries refine their boxes layer by layer, looking forward twice (DINO, 3.2-3.5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from efficient_detr.boxes import inverse_sigmoid
from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.dense import SelfAttention
from efficient_detr.modeling.attention.interface import DecoderAttention
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import MLP, FeedForward
from efficient_detr.modeling.position import BoxPositionEmbedding
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
        reference_boxes: Tensor,
        memory: FeatureTokens,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Update the queries.

        Args:
            query: (B, Q, C) query features.
            position: (B, Q, C) query positions.
            reference_boxes: (B, Q, 4) boxes (cx, cy, w, h) in [0, 1].
            memory: the encoder's tokens.
            attention_mask: (Q, Q) bool, True where self-attention is blocked, or None.

        Returns:
            (B, Q, C).
        """
        attended = self.self_attention(query, position, attention_mask)
        query = self.self_attention_norm(query + self.dropout(attended))
        attended = self.cross_attention(query, position, reference_boxes, memory)
        query = self.cross_attention_norm(query + self.dropout(attended))
        return self.feedforward_norm(query + self.dropout(self.feedforward(query)))


class BoxQueryPosition(nn.Module):
    """Query positions from reference boxes: sine embedding, then a two-layer network.

    Args:
        channels: C.
        temperature: ratio of the longest to the shortest wavelength of the embedding.
    """

    def __init__(self, *, channels: int, temperature: float = 10000.0) -> None:
        super().__init__()
        self.embedding = BoxPositionEmbedding(channels=channels, temperature=temperature)
        self.projection = MLP(sizes=[2 * channels, channels, channels])
        for parameter in self.projection.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, reference_boxes: Tensor, memory: FeatureTokens) -> Tensor:
        """Map boxes (B, Q, 4) to positions (B, Q, C), seen from the finest level's padded frame."""
        ratio = memory.valid_ratios[:, :1].repeat(1, 1, 2)  # (B, 1, 4)
        return self.projection(self.embedding(reference_boxes * ratio))


class TransformerDecoder(nn.Module):
    """A stack of decoder layers with a prediction head each.

    A layer moves the reference boxes by what its head reads from the raw query features; the next
    layer starts from there without gradient. A prediction adds what the head reads from the normed
    features to the boxes the layer started from, this time with their gradient, so a box learns
    from the layer after it too (look forward twice).

    Args:
        layers: the layers, in order; they may differ.
        heads: a prediction head for each layer.
        query_position: reference boxes -> query positions.
        channels: C.
    """

    def __init__(
        self,
        *,
        layers: Sequence[DecoderLayer],
        heads: Sequence[PredictionHead],
        query_position: BoxQueryPosition,
        channels: int,
    ) -> None:
        super().__init__()
        if len(layers) != len(heads):
            raise ConfigError(
                f"decoder.heads has {len(heads)} entries for {len(layers)} decoder.layers"
            )
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ModuleList(heads)
        self.query_position = query_position
        self.norm = nn.LayerNorm(channels)

    def forward(self, queries: Queries, memory: FeatureTokens) -> DecoderOutput:
        """Predict after every layer, denoising queries included."""
        content = queries.content
        reference = start = queries.reference_boxes  # the same boxes, without and with gradient
        logits, boxes, references = [], [], []
        heads = cast(Iterable[PredictionHead], self.heads)
        for layer, head in zip(self.layers, heads, strict=True):
            position = self.query_position(reference, memory)
            content = layer(content, position, reference, memory, queries.attention_mask)
            state = self.norm(content)
            logits.append(head.classify(state))
            boxes.append((head.regress(state) + inverse_sigmoid(start)).sigmoid())
            start = (head.regress(content) + inverse_sigmoid(reference)).sigmoid()
            references.append(start)
            reference = start.detach()
        return DecoderOutput(torch.stack(logits), torch.stack(boxes), torch.stack(references))
