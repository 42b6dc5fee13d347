"""Where decoder queries come from."""

from efficient_detr.modeling.queries.denoising import ContrastiveDenoising
from efficient_detr.modeling.queries.interface import QuerySource
from efficient_detr.modeling.queries.learned import LearnedQueries, ReferencePointQueries
from efficient_detr.modeling.queries.proposals import ProposalHead
from efficient_detr.modeling.queries.two_stage import (
    BestClassScore,
    BoxEmbeddedQueries,
    FirstClassScore,
    LearnedContentQueries,
    MemoryContentQueries,
)

__all__ = [
    "BestClassScore",
    "BoxEmbeddedQueries",
    "ContrastiveDenoising",
    "FirstClassScore",
    "LearnedContentQueries",
    "LearnedQueries",
    "MemoryContentQueries",
    "ProposalHead",
    "QuerySource",
    "ReferencePointQueries",
]
