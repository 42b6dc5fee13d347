"""Two-stage queries: the best encoder proposals become the start boxes of the decoder.

Query i is the i-th best proposal, so the order of the selection matters. The published models
differ in what scores a proposal and in where a query's content and position come from.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.layers import xavier_linear
from efficient_detr.modeling.position import sine_embedding
from efficient_detr.modeling.queries.interface import QuerySource
from efficient_detr.structures import (
    FeatureTokens,
    Proposals,
    Queries,
    SetPrediction,
    gather_tokens,
)


class BestClassScore:
    """The highest class logit scores a proposal (DINO; Sparse DETR's own proposal head)."""

    class_agnostic: ClassVar[bool] = False

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, S, K) class logits -> (B, S) scores."""
        return logits.amax(-1)


class FirstClassScore:
    """The first class logit scores a proposal: it means "object" (Deformable DETR, appendix A.4).

    The proposals are supervised with label 0 for every box.
    """

    class_agnostic: ClassVar[bool] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, S, K) class logits -> (B, S) scores."""
        return logits[..., 0]


class TwoStageQueries(QuerySource):
    """Selection of proposals, shared by all two-stage queries.

    Args:
        num_queries: Q.
        score: what scores a proposal.
    """

    needs_proposals = True
    gives_references = True
    gives_boxes = True

    def __init__(self, *, num_queries: int, score: BestClassScore | FirstClassScore) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.score = score

    def select(self, scores: Tensor) -> Tensor:
        """(B, Q) indices of the highest of the scores (B, S), best first.

        Raises:
            ConfigError: if the image has fewer tokens than there are queries.
        """
        if scores.shape[1] < self.num_queries:
            raise ConfigError(
                f"the input has {scores.shape[1]} tokens, fewer than "
                f"queries.num_queries={self.num_queries}: use a larger image or fewer queries"
            )
        return scores.topk(self.num_queries, dim=1).indices

    def all_predictions(self, proposals: Proposals) -> SetPrediction:
        """What every token proposes, to be supervised."""
        return SetPrediction(
            proposals.logits, proposals.box_logits.sigmoid(), self.score.class_agnostic
        )


class LearnedContentQueries(TwoStageQueries):
    """Learned contents at the boxes of the best proposals: DINO's mixed selection (section 3.4).

    Only the selected proposals are supervised. Positions follow from the boxes in the decoder.

    Args:
        num_queries: Q.
        channels: C.
    """

    def __init__(self, *, num_queries: int, channels: int) -> None:
        super().__init__(num_queries=num_queries, score=BestClassScore())
        self.content = nn.Parameter(torch.empty(num_queries, channels))
        nn.init.xavier_uniform_(self.content)

    def forward(self, memory: FeatureTokens, proposals: Proposals | None) -> Queries:
        """Select Q proposals."""
        proposals = _required(proposals)
        indices = self.select(self.score(proposals.logits))
        boxes = gather_tokens(proposals.box_logits, indices).sigmoid()
        logits = gather_tokens(proposals.logits, indices)
        return Queries(
            content=self.content.expand(boxes.shape[0], -1, -1),
            reference_boxes=boxes.detach(),
            proposal=SetPrediction(logits, boxes),
        )


class EmbeddedBoxQueries(TwoStageQueries):
    """Selection and embedding of boxes, shared by the two sources below.

    All proposals, selected or not, are supervised.

    Args:
        num_queries: Q.
        channels: C.
        score: what scores a proposal.
        temperature: ratio of the longest to the shortest wavelength of the embedding.

    Attributes:
        embeddings: how many vectors of C channels a box is projected to.
    """

    gives_positions = True
    embeddings: ClassVar[int]

    def __init__(
        self,
        *,
        num_queries: int,
        channels: int,
        score: BestClassScore | FirstClassScore,
        temperature: float = 10000.0,
    ) -> None:
        super().__init__(num_queries=num_queries, score=score)
        out_channels = self.embeddings * channels
        self.temperature = temperature
        self.projection = xavier_linear(2 * channels, out_channels)
        self.norm = nn.LayerNorm(out_channels)

    def embed(self, proposals: Proposals) -> tuple[Tensor, Tensor, Tensor]:
        """Select Q proposals: indices (B, Q), boxes (B, Q, 4), embeddings (B, Q, embeddings C)."""
        indices = self.select(self.score(proposals.logits))
        boxes = gather_tokens(proposals.box_logits, indices).sigmoid().detach()
        embedding = box_embedding(boxes, self.projection.in_features, self.temperature)
        return indices, boxes, self.norm(self.projection(embedding))


class BoxEmbeddedQueries(EmbeddedBoxQueries):
    """Position and content both from the embedding of the box (Deformable DETR, appendix A.4).

    Args: as of `EmbeddedBoxQueries`.
    """

    embeddings = 2

    def forward(self, memory: FeatureTokens, proposals: Proposals | None) -> Queries:
        """Select Q proposals."""
        proposals = _required(proposals)
        _, boxes, embedded = self.embed(proposals)
        position, content = embedded.chunk(2, dim=-1)
        return Queries(content, position, boxes, proposal=self.all_predictions(proposals))


class MemoryContentQueries(EmbeddedBoxQueries):
    """Content is the token itself, position the embedding of its box (Sparse DETR's released code).

    Args: as of `EmbeddedBoxQueries`.
    """

    embeddings = 1

    def forward(self, memory: FeatureTokens, proposals: Proposals | None) -> Queries:
        """Select Q proposals."""
        proposals = _required(proposals)
        indices, boxes, position = self.embed(proposals)
        content = gather_tokens(memory.features, indices)
        return Queries(content, position, boxes, proposal=self.all_predictions(proposals))


def box_embedding(boxes: Tensor, num_features: int, temperature: float) -> Tensor:
    """Sine embedding of boxes (B, Q, 4): a quarter of the features for each of cx, cy, w, h."""
    angles = boxes * (2 * math.pi)
    return sine_embedding(angles, num_features // 4, temperature).flatten(-2)


def _required(proposals: Proposals | None) -> Proposals:
    if proposals is None:
        raise ConfigError("two-stage queries need detector.proposals: set it")
    return proposals
