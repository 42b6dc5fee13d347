"""Checks, when a model is built, that losses and post-processing fit the detector.

How the parts of the detector fit each other is checked in `modeling.compatibility`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from efficient_detr.errors import ConfigError
from efficient_detr.losses.interface import DetectorLoss
from efficient_detr.modeling.distillation import DistillationDetector
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.queries import ContrastiveDenoising

if TYPE_CHECKING:
    from efficient_detr.meta_arch import EfficientDETR


def check_model(model: EfficientDETR) -> None:
    """Check a model.

    Raises:
        ConfigError: at the first two parts that do not fit together; it names both.
    """
    _check_num_classes(model)
    _check_background_classes(model)
    for loss in model.losses:
        if isinstance(loss, DetectorLoss):
            loss.check_detector(model.detector)
    _check_supervised(model)


def _check_num_classes(model: EfficientDETR) -> None:
    for name, part in model.detector.named_modules():
        if not isinstance(part, PredictionHead | ContrastiveDenoising):
            continue
        if part.num_classes != model.num_classes:
            raise ConfigError(
                f"detector.{name} ({type(part).__name__}) has num_classes={part.num_classes}, but "
                f"model.num_classes={model.num_classes} ({type(model).__name__}): set them to the "
                "same number"
            )


def _check_background_classes(model: EfficientDETR) -> None:
    """Softmax losses and results want a class for "no object", sigmoid ones have none."""
    parts = [(name, part) for name, part in model.named_modules() if name.startswith("losses.")]
    parts.append(("postprocessor", model.postprocessor))
    for name, part in parts:
        expected = getattr(part, "background_classes", None)
        for head_name, head in model.detector.named_modules():
            if not isinstance(head, PredictionHead) or expected is None:
                continue
            if head.background_classes != expected:
                raise ConfigError(
                    f"{name} ({type(part).__name__}) is made for background_classes={expected}, "
                    f"but detector.{head_name} ({type(head).__name__}) has background_classes="
                    f"{head.background_classes}: set it to {expected}, or use "
                    f"{'sigmoid' if expected else 'softmax'} losses and post-processing"
                )


def _check_supervised(model: EfficientDETR) -> None:
    """What only a loss of its own trains must have that loss."""
    losses = list(model.losses)
    # Another module than a DetectorLoss may train whatever it likes.
    if not losses or not all(isinstance(loss, DetectorLoss) for loss in losses):
        return
    selection = model.detector.selection
    if selection is not None and not any(loss.supervises_selection for loss in losses):
        raise ConfigError(
            f"detector.selection ({type(selection).__name__}) would not be trained by any of "
            f"model.losses ({_names(losses)}): add ForegroundLoss or TokenAttentionLoss, or remove "
            "the selection"
        )
    student = isinstance(model.detector, DistillationDetector)
    if student and not any(loss.supervises_student for loss in losses):
        raise ConfigError(
            "the student of model.detector (DistillationDetector) would not be trained by any of "
            f"model.losses ({_names(losses)}): add BoxDistillationLoss or use Detector"
        )


def _names(parts: Sequence[nn.Module]) -> str:
    return ", ".join(type(part).__name__ for part in parts)
