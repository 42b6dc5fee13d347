"""Which tokens an encoder layer updates."""

from efficient_detr.modeling.selection.base import TokenSelector
from efficient_detr.modeling.selection.foreground import ForegroundTokenSelector
from efficient_detr.modeling.selection.object_score import (
    LogitProductScore,
    ObjectScore,
    ProbabilityProductScore,
)
from efficient_detr.modeling.selection.salient import SalientTokenSelector
from efficient_detr.modeling.selection.score_head import ForegroundScoreHead

__all__ = [
    "ForegroundScoreHead",
    "ForegroundTokenSelector",
    "LogitProductScore",
    "ObjectScore",
    "ProbabilityProductScore",
    "SalientTokenSelector",
    "TokenSelector",
]
