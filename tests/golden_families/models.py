"""Models from the configs of the project, at the sizes that a fixture gives."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig, instantiate
from torch import Tensor, nn

from efficient_detr.checkpoint import convert_keys
from efficient_detr.checkpoint.conversion import Row
from efficient_detr.checkpoint.formats import recognize_format
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.layers import FeedForward

CONFIGS = Path(__file__).parents[2] / "configs" / "common" / "models"
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}
STAGES = ("res2", "res3", "res4", "res5")


class StoredBackbone(nn.Module):
    """Returns stored feature maps, whatever the image."""

    def __init__(self, features: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.features = dict(features)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.features


@functools.cache
def builder(file: str, function: str) -> Any:
    """A function of `configs/common/models/<file>.py`."""
    return LazyConfig.load(str(CONFIGS / f"{file}.py"), function)


def transformer_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments that the configs of all DETRs share, at a fixture's sizes."""
    channels = config["backbone_channels"]
    return dict(
        backbone=None,
        in_features=last_stages(len(channels)),
        in_channels=channels,
        channels=config["d_model"],
        num_heads=config["nhead"],
        hidden_channels=config["dim_feedforward"],
        encoder_layers=config["enc_layers"],
        decoder_layers=config["dec_layers"],
        num_queries=config["num_queries"],
        dropout=0.0,
    )


def last_stages(count: int) -> tuple[str, ...]:
    """Names of the last stages of a ResNet."""
    return STAGES[-count:]


def build(
    config: Any,
    features: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None = None,
) -> EfficientDETR:
    """A model in evaluation mode that starts at stored backbone maps.

    Args:
        config: the model's LazyConfig.
        features: the backbone's maps.
        state: the weights, under their official keys; all of the model's, and no others.
        settings: the fixture's JSON; weights of losses in it take the place of the config's.
    """
    model: EfficientDETR = instantiate(config)
    use_loss_settings(model, settings or {})
    use_activation(model, settings or {})
    model.detector.backbone = StoredBackbone(features)
    model.load_state_dict(convert_keys(state, key_table(state)), strict=True)
    return model.eval()


def key_table(weights: Mapping[str, Tensor]) -> list[Row]:
    """The table that converts official weights, by the format that their keys have."""
    found = recognize_format(weights.keys())
    if found is None:
        raise ValueError(f"weights of a golden fixture in an unknown format: {[*weights][:3]}")
    return found.read_table({key: tuple(tensor.shape) for key, tensor in weights.items()})


def use_loss_settings(model: EfficientDETR, info: Mapping[str, Any]) -> None:
    """Set the weights of the set loss and its matcher where a fixture's JSON gives them."""
    config, loss = info.get("config") or {}, info.get("loss") or {}
    given = loss.get("weight_dict", {})
    weights = {name: given[f"loss_{name}"] for name in ("ce", "bbox", "giou") if given}
    set_loss = model.losses[0]
    set_weights(set_loss, weights or config.get("loss_weights", {}), "ce")
    set_weights(set_loss.matcher, loss.get("matcher_cost") or config.get("matcher", {}), "cls")
    for part in (set_loss.class_loss, set_loss.matcher.class_cost):
        for name, setting in (
            ("alpha", loss.get("focal_alpha")),
            ("gamma", loss.get("focal_gamma")),
            ("no_object_weight", config.get("eos_coef")),
        ):
            if setting is not None and hasattr(part, name):
                setattr(part, name, setting)


def set_weights(part: Any, weights: Mapping[str, float], class_name: str) -> None:
    """Weigh the terms of a matcher or set loss; `class_name` is their name for the class."""
    names = {class_name: "class_weight", "bbox": "box_weight", "giou": "giou_weight"}
    for name, weight in weights.items():
        setattr(part, names[name], weight)


def use_activation(model: EfficientDETR, info: Mapping[str, Any]) -> None:
    """Set the activation of the feed-forward networks where a fixture's JSON names one."""
    name = (info.get("config") or {}).get("activation", "relu")
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r} of a golden fixture: know {[*ACTIVATIONS]}")
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.activation = ACTIVATIONS[name]()
