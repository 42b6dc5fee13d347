"""Queries that are the same for every image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efficient_detr.modeling.queries.interface import QuerySource
from efficient_detr.structures import FeatureTokens, Proposals, Queries


class LearnedQueries(QuerySource):
    """Learned positions and zero contents (DETR's object queries, section 3.2).

    Args:
        num_queries: Q.
        channels: C.
    """

    gives_positions = True

    def __init__(self, *, num_queries: int, channels: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(num_queries, channels))

    def forward(self, memory: FeatureTokens, proposals: Proposals | None) -> Queries:
        """Repeat the queries for every image."""
        position = _for_every_image(self.position, memory)
        return Queries(content=torch.zeros_like(position), position=position)


class ReferencePointQueries(QuerySource):
    """Learned positions and contents; a position also says the reference point (Deformable DETR).

    Args:
        num_queries: Q.
        channels: C.
    """

    gives_positions = True
    gives_references = True

    def __init__(self, *, num_queries: int, channels: int) -> None:
        super().__init__()
        # Position and content side by side.
        self.embedding = nn.Parameter(torch.randn(num_queries, 2 * channels))
        self.reference_points = nn.Linear(channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: FeatureTokens, proposals: Proposals | None) -> Queries:
        """Repeat the queries for every image."""
        position, content = _for_every_image(self.embedding, memory).chunk(2, dim=-1)
        points = self.reference_points(position).sigmoid()
        return Queries(content=content, position=position, reference_boxes=points)


def _for_every_image(embedding: Tensor, memory: FeatureTokens) -> Tensor:
    """(Q, C) -> (B, Q, C)."""
    return embedding.expand(memory.features.shape[0], -1, -1)
