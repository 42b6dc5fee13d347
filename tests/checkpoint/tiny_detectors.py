"""Tiny detectors with a ResNet, whose weights every published layout has a place for."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from torch import Tensor, nn

from tests.tiny_models import MODELS

WIDTHS = (8, 8, 12, 16)


def tiny_resnet(norm: str = "FrozenBN") -> Any:
    """A LazyConfig of a ResNet with one basic block a stage."""
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=8, norm=norm),
        stages=[
            L(ResNet.make_stage)(
                block_class=BasicBlock,
                num_blocks=1,
                in_channels=before,
                out_channels=after,
                norm=norm,
                stride=stride,
            )
            for before, after, stride in zip((8, *WIDTHS[:3]), WIDTHS, (1, 2, 2, 2), strict=True)
        ],
        out_features=["res3", "res4", "res5"],
    )


def tiny_node(family: str, name: str | None = None, **sizes: Any) -> Any:
    """The LazyConfig of a detector with two encoder and two decoder layers.

    Args:
        family: name of the file in `configs/common/models`.
        name: name of the function in it, None for that of the file.
        **sizes: arguments of the function.
    """
    common: dict[str, Any] = dict(
        backbone=tiny_resnet(),
        channels=16,
        num_heads=2,
        hidden_channels=24,
        encoder_layers=2,
        decoder_layers=2,
        num_queries=6,
        num_classes=5,
    )
    if family == "detr":
        common |= dict(in_features=["res5"], in_channels=[16])
    else:
        common |= dict(in_channels=[8, 12, 16], num_groups=4)
    function = LazyConfig.load(str(MODELS / f"{family}.py"), name or family)
    return function(**{**common, **sizes})


def tiny_detector(family: str, name: str | None = None, **sizes: Any) -> nn.Module:
    """The model of `tiny_node`."""
    torch.manual_seed(0)
    model: nn.Module = instantiate(tiny_node(family, name, **sizes))
    return model


def random_weights(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with a random number everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
