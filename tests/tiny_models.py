"""Tiny DINO and Focus-DETR, tokens and targets, for tests that need a model but no weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention.dense import MultiHeadAttention
from efficient_detr.modeling.decoder import BoxQueryPosition
from efficient_detr.modeling.position import SinePositionEmbedding
from efficient_detr.modeling.tokenizer import LevelFeatureTokenizer
from efficient_detr.structures import (
    DetectorOutput,
    FeatureTokens,
    Queries,
    SpatialShapes,
    Targets,
)

MODELS = Path(__file__).parents[1] / "configs" / "common" / "models"

SIZES: dict[str, Any] = dict(
    in_channels=[8, 12, 16],
    num_classes=5,
    channels=16,
    num_heads=2,
    num_points=2,
    num_levels=4,
    hidden_channels=24,
    num_groups=4,
    decoder_layers=2,
    num_queries=12,
    num_denoising_queries=6,
    num_detections=20,
)


class PatchBackbone(nn.Module):
    """Three feature maps at strides 8, 16 and 32 from patches that do not overlap.

    A cell sees its own patch only, so padding cannot leak into the cells of the image.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, stride, stride=stride)
            for before, after, stride in zip([3, *widths[:-1]], widths, [8, 2, 2], strict=True)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = {}
        for name, stage in zip(["res3", "res4", "res5"], self.stages, strict=True):
            images = stage(images).relu()
            outputs[name] = images
        return outputs


class FirstChannel(nn.Module):
    """Stands in for the score head: the score of a token is its first channel."""

    def forward(self, features: Tensor) -> Tensor:
        return features[..., 0]


def tiny_config(family: str, **arguments: Any) -> Any:
    """The LazyConfig of "dino" or "focus_detr" with tiny sizes and `PatchBackbone`."""
    sizes = {"backbone": L(PatchBackbone)(widths=[8, 12, 16]), **SIZES, **arguments}
    if family == "dino":
        sizes.setdefault("encoder_layers", 2)
    else:
        sizes = {"layer_keep_ratios": [1.0, 0.5], "num_object_tokens": 7, **sizes}
    return LazyConfig.load(str(MODELS / f"{family}.py"), family)(**sizes)


def tiny_model(family: str, **arguments: Any) -> EfficientDETR:
    """A tiny model in training mode, with weights off their start values."""
    model: EfficientDETR = with_noise(instantiate(tiny_config(family, **arguments)))
    return model


def with_noise(module: nn.Module, std: float = 0.1) -> Any:
    """The module with noise on every parameter.

    Freshly initialised box heads and sampling offsets have zero weights, behind which parameters
    get no gradient; a little noise puts a model somewhere generic.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module


def run_training(
    model: EfficientDETR, targets: list[Targets]
) -> tuple[DetectorOutput, dict[str, Tensor]]:
    """Output and losses of a padded batch of two images, 64 x 96 and 48 x 64 pixels."""
    mask = padding_mask([(64, 96), (48, 64)], (64, 96))
    images = torch.randn(2, 3, 64, 96).masked_fill(mask[:, None], 0)
    output = model.detector(images, mask, targets)
    return output, model.compute_losses(output, targets)


class UnpaddedQueryPosition(BoxQueryPosition):
    """Embeds the boxes in the frame of the image instead of the padded frame of level 0."""

    def forward(
        self, queries: Queries, reference_boxes: Tensor | None, memory: FeatureTokens
    ) -> Tensor:
        ratios = torch.ones_like(memory.valid_ratios)
        unpadded = dataclasses.replace(memory, valid_ratios=ratios)
        return super().forward(queries, reference_boxes, unpadded)


def use_unpadded_query_positions(model: EfficientDETR, channels: int = 16) -> None:
    """The published decoder embeds boxes as seen in the padded batch: put that trait aside."""
    published = model.detector.decoder.query_position
    model.detector.decoder.query_position = UnpaddedQueryPosition(channels=channels)
    model.detector.decoder.query_position.load_state_dict(published.state_dict())


def image_input(
    height: int, width: int, boxes: list[list[float]] | None = None, labels: list[int] | None = None
) -> dict[str, Any]:
    """One of Detectron2's input dicts with random pixels; boxes are (x0, y0, x1, y1) in pixels."""
    inputs: dict[str, Any] = {
        "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8),
        "file_name": f"{height}x{width}.jpg",
        "image_id": 7,
    }
    if boxes is not None:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.gt_classes = torch.tensor(labels or [0] * len(boxes), dtype=torch.int64)
        inputs["instances"] = instances
    return inputs


def targets_of(
    *images: list[list[float]],
    labels: list[list[int]] | None = None,
    size: tuple[int, int] = (64, 96),
) -> list[Targets]:
    """Targets from normalised boxes (cx, cy, w, h); labels count up from 0 unless given."""
    return [
        Targets(
            labels=torch.tensor(labels[i] if labels else list(range(len(boxes)))).long(),
            boxes=torch.tensor(boxes).reshape(-1, 4),
            image_size=size,
        )
        for i, boxes in enumerate(images)
    ]


def padding_mask(sizes: list[tuple[int, int]], padded: tuple[int, int]) -> Tensor:
    """(B, H, W) mask of images in the upper left corners of a padded batch."""
    mask = torch.ones(len(sizes), *padded, dtype=torch.bool)
    for image_mask, (height, width) in zip(mask, sizes, strict=True):
        image_mask[:height, :width] = False
    return mask


def random_tokens(
    shapes: SpatialShapes,
    *,
    batch: int = 1,
    channels: int = 8,
    sizes: list[tuple[int, int]] | None = None,
    stride: int = 8,
) -> FeatureTokens:
    """Tokens of random maps; `sizes` are the unpadded images, `stride` that of the first level."""
    padded = (shapes[0][0] * stride, shapes[0][1] * stride)
    mask = padding_mask(sizes or [padded] * batch, padded)
    tokenizer = LevelFeatureTokenizer(
        position_embedding=SinePositionEmbedding(channels=channels),
        channels=channels,
        num_levels=len(shapes),
    )
    maps = [torch.randn(len(mask), channels, *shape) for shape in shapes]
    with torch.no_grad():
        return tokenizer(maps, mask)


def empty_tokens(shapes: SpatialShapes, *, batch: int = 1) -> FeatureTokens:
    """Unpadded tokens of no channels, for tests that only want to know their layout."""
    count, levels = sum(height * width for height, width in shapes), len(shapes)
    return FeatureTokens(
        features=torch.zeros(batch, count, 0),
        positions=torch.zeros(batch, count, 0),
        padding_mask=torch.zeros(batch, count, dtype=torch.bool),
        spatial_shapes=shapes,
        image_sizes=torch.ones(batch, 2),
        valid_ratios=torch.ones(batch, levels, 2),
        reference_points=torch.zeros(batch, count, levels, 2),
    )


def torch_attention(attention: MultiHeadAttention) -> nn.MultiheadAttention:
    """Torch's own multi-head attention with the same weights, which bear the same names."""
    channels = attention.in_proj_weight.shape[1]
    module = nn.MultiheadAttention(channels, attention.num_heads, batch_first=True)
    module.load_state_dict(attention.state_dict())
    return module


def randomised(module: nn.Module, std: float = 0.3) -> Any:
    """The module with every parameter, norms included, away from its start value."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def total(losses: dict[str, Tensor]) -> Tensor:
    """Sum of the losses."""
    return torch.stack(list(losses.values())).sum()


def logit(probability: float) -> float:
    """Inverse of the sigmoid."""
    return math.log(probability / (1 - probability))
