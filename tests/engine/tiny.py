"""A detector, a data set and a config that train in milliseconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor, nn

CLASSES = ("square", "disc", "cross")

CONFIG = """
import detectron2.data.transforms as T
import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf

from efficient_detr.data.datasets import detection_dataset
from efficient_detr.data.loader import build_train_loader
from efficient_detr.data.mapper import DetrDatasetMapper
from tests.engine.tiny import TinyDetector, tiny_resnet
from tests.tiny_models import PatchBackbone, tiny_config

model = {model}

dataloader = OmegaConf.create()
dataloader.train = L(build_train_loader)(
    dataset=L(detection_dataset)(
        names="{name}_train", json_file="{root}/train.json", image_root="{root}/train"
    ),
    mapper=L(DetrDatasetMapper)(
        is_train=True,
        augmentations=[
            L(T.RandomFlip)(),
            L(T.ResizeShortestEdge)(short_edge_length=[24, 32], sample_style="choice"),
        ],
        crop_augmentations=[L(T.RandomCrop)(crop_type="absolute_range", crop_size=[16, 24])],
    ),
    total_batch_size=2,
    num_workers=0,
    seed="${{train.seed}}",
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(detection_dataset)(
        names="{name}_val",
        json_file="{root}/val.json",
        image_root="{root}/val",
        filter_empty=False,
    ),
    mapper=L(DetrDatasetMapper)(
        is_train=False, augmentations=[L(T.ResizeShortestEdge)(short_edge_length=32)]
    ),
)
dataloader.evaluator = L(COCOEvaluator)(dataset_name="${{..test.dataset.names}}")

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr="${{..lr}}", weight_decay_norm=0.0), lr=1e-2
)
lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[5, 8])
train = dict(
    output_dir="{root}/output",
    init_checkpoint="",
    max_iter=8,
    seed=3,
    device="cpu",
    amp=dict(enabled=False, dtype="bfloat16"),
    clip_max_norm=0.1,
    ddp=dict(broadcast_buffers=False),
    checkpointer=dict(period=4, max_to_keep=5),
    eval_period=0,
    log_period=2,
    flops_images=1,
)
"""


TINY_DETECTOR = "L(TinyDetector)(num_classes=3)"

# The project's own model. Its backbone takes patches of 32 pixels and more.
FOCUS_DETR = (
    'tiny_config("focus_detr", num_classes=3, backbone=L(PatchBackbone)(widths=[8, 12, 16]))'
)


def tiny_resnet() -> Any:
    """The LazyConfig of a ResNet whose maps are those of `PatchBackbone`."""
    widths = [4, 8, 12, 16]
    stages = [
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            stride_per_block=[stride],
            in_channels=before,
            out_channels=after,
            norm="FrozenBN",
        )
        for stride, before, after in zip([1, 2, 2, 2], [4, *widths[:-1]], widths, strict=True)
    ]
    stem = L(BasicStem)(in_channels=3, out_channels=4, norm="FrozenBN")
    return L(ResNet)(stem=stem, stages=stages, out_features=["res3", "res4", "res5"])


class TinyDetector(nn.Module):
    """Predicts one box an image from pooled features; draws noise in training, as denoising does.

    Args:
        num_classes: K.
        width: channels of the features.
    """

    def __init__(self, *, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.GroupNorm(2, width)
        self.classes = nn.Linear(width, num_classes)
        self.boxes = nn.Linear(width, 4)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, else Detectron2's outputs."""
        features = torch.stack([self._pool(x["image"]) for x in batched_inputs])
        if self.training:
            features = features + 0.1 * torch.randn_like(features)
            return self._losses(features, batched_inputs)
        return [self._detect(f, x) for f, x in zip(features, batched_inputs, strict=True)]

    def _pool(self, image: Tensor) -> Tensor:
        features: Tensor = self.norm(self.backbone(image[None].float() / 255 - 0.5))
        return features.relu().mean(dim=(0, 2, 3))

    def _losses(self, features: Tensor, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        zero = features.sum() * 0
        losses = {"loss_class": zero, "loss_box": zero}
        for feature, inputs in zip(features, batch, strict=True):
            truth = inputs["instances"]
            if len(truth) == 0:
                continue
            logits = self.classes(feature).expand(len(truth), -1)
            losses["loss_class"] = losses["loss_class"] + nn.functional.cross_entropy(
                logits, truth.gt_classes
            )
            wanted = truth.gt_boxes.tensor.mean(dim=0) / max(truth.image_size)
            losses["loss_box"] = losses["loss_box"] + (self.boxes(feature) - wanted).abs().sum()
        return losses

    def _detect(self, feature: Tensor, inputs: dict[str, Any]) -> dict[str, Instances]:
        height, width = inputs["height"], inputs["width"]
        corner = self.boxes(feature).sigmoid()[:2] * 0.5
        scale = torch.tensor([width, height, width, height])
        result = Instances((height, width))
        result.pred_boxes = Boxes((torch.cat([corner, corner + 0.4]) * scale)[None])
        scores = self.classes(feature).softmax(0)
        result.scores, result.pred_classes = scores.max(0).values[None], scores.argmax(0)[None]
        return {"instances": result}


def write_split(root: Path, split: str, *, num_images: int = 6) -> None:
    """Write pictures of alternating shape and a COCO file with two boxes each."""
    random = np.random.default_rng(0)
    (root / split).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(1, num_images + 1):
        width, height = (40, 32) if index % 2 else (32, 40)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
        for number in range(2):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": 1 + (index + number) % len(CLASSES),
                    "bbox": [2 + 8 * number, 4, 16, 20],
                    "area": 320,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{split}.json").write_text(json.dumps(content))


def write_project(root: Path, *, model: str = TINY_DETECTOR) -> str:
    """Write data and config, with the model of this text, into a folder; return the config's path.

    The names of the data sets contain the folder's, because Detectron2's catalog is global.
    """
    for split in ("train", "val"):
        write_split(root, split)
    path = root / "config.py"
    path.write_text(CONFIG.format(root=root.as_posix(), name=f"tiny_{root.name}", model=model))
    return str(path)
