"""Which tokens an encoder layer updates."""

from efficient_detr.modeling.selection.foreground import (
    ForegroundScoreHead,
    ForegroundTokenSelector,
)
from efficient_detr.modeling.selection.object_score import (
    LogitProductScore,
    ObjectScore,
    ProbabilityProductScore,
)

__all__ = [
    "ForegroundScoreHead",
    "ForegroundTokenSelector",
    "LogitProductScore",
    "ObjectScore",
    "ProbabilityProductScore",
]
