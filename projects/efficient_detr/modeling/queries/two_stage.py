"""Two-stage queries: the best encoder proposals become the start boxes (DINO, section 3.4).

DINO's mixed query selection: positions come from the proposals, contents are learned. Query i is
tied to the i-th best proposal, so the order of the selection matters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.structures import Proposals, Queries, SetPrediction, gather_tokens


class TwoStageQueries(nn.Module):
    """Learned contents at the boxes of the highest-scoring proposals.

    Args:
        num_queries: Q.
        channels: C.
    """

    def __init__(self, *, num_queries: int, channels: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.content = nn.Parameter(torch.empty(num_queries, channels))
        nn.init.xavier_uniform_(self.content)

    def select(self, scores: Tensor) -> Tensor:
        """(B, Q) indices of the highest of the scores (B, S), best first."""
        return scores.topk(self.num_queries, dim=1).indices

    def forward(self, proposals: Proposals) -> Queries:
        """Select Q proposals.

        Raises:
            ConfigError: if the image has fewer tokens than there are queries.
        """
        scores = proposals.logits.amax(-1)  # (B, S)
        if scores.shape[1] < self.num_queries:
            raise ConfigError(
                f"the input has {scores.shape[1]} tokens, fewer than "
                f"queries.num_queries={self.num_queries}: use a larger image or fewer queries"
            )
        indices = self.select(scores)
        boxes = gather_tokens(proposals.box_logits, indices).sigmoid()
        logits = gather_tokens(proposals.logits, indices)
        return Queries(
            content=self.content.expand(boxes.shape[0], -1, -1),
            reference_boxes=boxes.detach(),
            proposal=SetPrediction(logits, boxes),
        )
