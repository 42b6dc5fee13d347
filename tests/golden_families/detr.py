"""Fixtures of DETR."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efficient_detr.meta_arch import EfficientDETR
from tests.golden_families.fixture import Comparison, Fixture
from tests.golden_families.models import build, builder, last_stages, transformer_arguments
from tests.golden_families.transformer import (
    Run,
    compare_evaluation,
    compare_predictions,
    compare_training,
)


def detr_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the config `detr` at a fixture's sizes."""
    return dict(transformer_arguments(config), num_classes=config["class_logits"] - 1)


def detr_config(fixture: Fixture) -> Any:
    config = builder("detr", "detr")(**detr_arguments(fixture.config))
    return builder("detr", "pre_norm")(config) if fixture.config["pre_norm"] else config


def build_detr(fixture: Fixture) -> EfficientDETR:
    return build_model(detr_config(fixture), fixture)


def build_model(config: Any, fixture: Fixture) -> EfficientDETR:
    """The model of a config with official DETR weights."""
    return build(config, backbone_maps(fixture), fixture.weights(), fixture.info)


def backbone_maps(fixture: Fixture) -> dict[str, Tensor]:
    """The stored maps under the names of the last stages; their own names end in a number."""
    stored = fixture.group("inputs/feat.")
    names = sorted(stored, key=lambda name: int(name.strip("s")))
    stages = zip(last_stages(len(names)), names, strict=True)
    return {stage: stored[name] for stage, name in stages}


def compare(comparison: Comparison) -> None:
    fixture = comparison.fixture
    run = Run.start(build_detr(fixture).train(), fixture)
    comparison.read(run.stages())
    compare_predictions(run, comparison)
    compare_training(run, comparison)
    compare_evaluation(build_detr(fixture), comparison, ordered=True)
