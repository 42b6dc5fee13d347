"""What every source of decoder queries offers."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from efficient_detr.structures import FeatureTokens, Proposals, Queries


class QuerySource(nn.Module):
    """Makes the decoder's queries from the encoder's memory.

    Attributes:
        needs_proposals: the queries are made from `detector.proposals`.
        gives_positions: the queries carry position embeddings of their own.
        gives_references: the queries carry reference points or boxes.
        gives_boxes: the references are boxes (cx, cy, w, h), not only points.
    """

    needs_proposals: ClassVar[bool] = False
    gives_positions: ClassVar[bool] = False
    gives_references: ClassVar[bool] = False
    gives_boxes: ClassVar[bool] = False

    def forward(self, memory: FeatureTokens, proposals: Proposals | None) -> Queries:
        """Make queries for the B images of `memory`; `proposals` are those of its tokens."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")
