"""Pictures of what a detector sees, keeps and predicts, and of how its training went."""

from __future__ import annotations

from efficient_detr.visualization.curves import read_metrics, save_curves
from efficient_detr.visualization.predictions import (
    DetectionExample,
    detection_example,
    save_predictions,
)
from efficient_detr.visualization.tokens import TokenExample, collect_token_examples, save_tokens

__all__ = [
    "DetectionExample",
    "TokenExample",
    "collect_token_examples",
    "detection_example",
    "read_metrics",
    "save_curves",
    "save_predictions",
    "save_tokens",
]
