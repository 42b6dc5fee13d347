"""Every family learns two photographs by heart: loss, matching, gradients and evaluation agree.

The photographs are scikit-learn's sample images, with boxes drawn by hand. A model is that of its
config with small numbers and a narrow backbone; training is full-batch AdamW without augmentation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import SwinTransformer
from sklearn.datasets import load_sample_images

from efficient_detr.data.datasets import detection_dataset
from efficient_detr.data.mapper import DetrDatasetMapper
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.backbones.dat_variants import StageSpecification, dat, dat_plus_plus

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = CONFIGS / "common" / "models"

CATEGORIES = ["building", "plant", "flower"]
# (left, right) columns that are kept of a photograph: the two have different shapes, so one of them
# is padded. Then boxes (x0, y0, x1, y1) in pixels of the photograph with their category.
PHOTOGRAPHS: dict[str, tuple[tuple[int, int], list[tuple[list[int], str]]]] = {
    "china.jpg": (
        (0, 640),
        [
            ([62, 30, 352, 400], "building"),
            ([546, 136, 640, 427], "plant"),
            ([325, 275, 575, 427], "plant"),
        ],
    ),
    "flower.jpg": (
        (100, 560),
        [([168, 85, 447, 358], "flower"), ([288, 374, 468, 427], "flower")],
    ),
}
SHORT_SIDE = 96
LEARNING_RATE = 2e-3
ITERATIONS = 150


def write_dataset(folder: Path) -> tuple[str, str]:
    """The cropped photographs in COCO's format: annotation file and image folder."""
    sample = load_sample_images()
    pixels = {
        Path(name).name: image for name, image in zip(sample.filenames, sample.images, strict=True)
    }
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, ((left, right), boxes)) in enumerate(PHOTOGRAPHS.items(), start=1):
        image = pixels[name][:, left:right]
        cv2.imwrite(str(folder / name), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        height, width = image.shape[:2]
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for (x0, y0, x1, y1), category in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": CATEGORIES.index(category) + 1,
                    "bbox": [x0 - left, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CATEGORIES, start=1)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(data))
    return str(folder / "instances.json"), str(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Name of the data set, and both images with their boxes as input of a model."""
    name = "two_photographs"
    json_file, image_root = write_dataset(tmp_path_factory.mktemp("photographs"))
    records = detection_dataset(name, json_file=json_file, image_root=image_root)
    resize = T.ResizeShortestEdge(short_edge_length=SHORT_SIDE, max_size=1333)
    mapper = DetrDatasetMapper(is_train=True, augmentations=[resize])
    return name, [mapper(record) for record in records]


TINY = dict(
    num_classes=len(CATEGORIES),
    channels=64,
    num_heads=4,
    hidden_channels=128,
    encoder_layers=2,
    decoder_layers=2,
    num_queries=12,
    dropout=0.0,
)
WIDTHS = [16, 32, 64, 128]
MULTI_SCALE = dict(in_channels=WIDTHS[1:], num_levels=4, num_groups=8)
DEFORMABLE = {**TINY, **MULTI_SCALE, "encoder_points": 2, "decoder_points": 2}
DINO = {k: v for k, v in {**TINY, **MULTI_SCALE}.items() if k != "dropout"}
DINO |= dict(num_points=2, num_denoising_queries=8, num_detections=12)
FOCUS = {k: v for k, v in DINO.items() if k != "encoder_layers"}
FOCUS |= dict(layer_keep_ratios=[1.0, 0.6], num_object_tokens=10)

SMCA = {k: v for k, v in TINY.items() if k != "encoder_layers"}  # it has a list of layers
# Six rounds of hashing make fewer clusters than the 54 tokens.
ACT = dict(TINY, in_features=["res4"], in_channels=WIDTHS[2:3], rounds=6, min_tokens=0)

# Name: (file, function, arguments).
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "detr": ("detr", "detr", dict(TINY, in_channels=WIDTHS[3:])),
    "deformable_detr": ("deformable_detr", "deformable_detr", DEFORMABLE),
    "deformable_detr_refine": ("deformable_detr", "deformable_detr_refine", DEFORMABLE),
    "deformable_detr_two_stage": ("deformable_detr", "deformable_detr_two_stage", DEFORMABLE),
    "sparse_detr": ("sparse_detr", "sparse_detr", DEFORMABLE),
    "smca": ("smca", "smca", dict(TINY, in_channels=WIDTHS[3:])),
    "smca_multi_scale": ("smca", "smca_multi_scale", dict(SMCA, in_channels=WIDTHS[2:])),
    "smca_conv": ("smca", "smca_conv", dict(TINY, in_channels=WIDTHS[1:], encoder_layers=1)),
    "act_detr": ("act_detr", "act_detr", ACT),
    "act_detr_mtkd": ("act_detr", "act_detr", ACT),
    "dino": ("dino", "dino", DINO),
    "focus_detr": ("focus_detr", "focus_detr", FOCUS),
}


HEADS = [2, 4, 8, 16]
# Short side 96: a batch is padded to 96 x 160 pixels, maps of 24 x 40 to 3 x 5 cells.
TRANSFORMERS: dict[str, Any] = {
    "dat": dat(
        [
            StageSpecification(letters, channels, heads, num_groups=2)
            for letters, channels, heads in zip(["L", "LS", "LD", "D"], WIDTHS, HEADS, strict=True)
        ],
        image_size=96,
        window=3,
    ),
    "dat_plus_plus": dat_plus_plus(
        [
            StageSpecification(letters, channels, heads, num_groups=2, key_stride=stride)
            for letters, channels, heads, stride in zip(
                ["N", "ND", "ND", "D"], WIDTHS, HEADS, [4, 4, 2, 1], strict=True
            )
        ],
        image_size=96,
        window=3,
    ),
    "swin": L(SwinTransformer)(
        embed_dim=WIDTHS[0],
        depths=[2, 2, 2, 2],
        num_heads=HEADS,
        window_size=3,
        drop_path_rate=0.0,
        out_indices=[1, 2, 3],
    ),
}
# Which family learns with it; maps are those of stages 1 to 3.
FAMILY_OF_TRANSFORMER = {
    "dat": "focus_detr",
    "dat_plus_plus": "deformable_detr_two_stage",
    "swin": "dino",
}


def tiny_config(family: str, **backbone: Any) -> Any:
    file, function, arguments = FAMILIES[family]
    narrow_resnet = LazyConfig.load(str(CONFIGS / "quickstart.py"), "narrow_resnet")
    path = str(MODELS / f"{file}.py")
    arguments = {"backbone": narrow_resnet(16, WIDTHS), **arguments, **backbone}
    model = LazyConfig.load(path, function)(**arguments)
    return LazyConfig.load(path, "distilled")(model) if family.endswith("_mtkd") else model


def overfit(model: EfficientDETR, batch: list[dict[str, Any]]) -> list[float]:
    """Train on one batch with a learning rate that rises and falls; returns the total losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=ITERATIONS, pct_start=0.1
    )
    model.train()
    history = []
    for _ in range(ITERATIONS):
        loss = torch.stack(list(model(batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append(loss.item())
    return history


def average_precision(
    model: EfficientDETR, batch: list[dict[str, Any]], dataset_name: str
) -> float:
    model.eval()
    evaluator = COCOEvaluator(dataset_name, tasks=("bbox",))
    return inference_on_dataset(model, [batch], evaluator)["bbox"]["AP"] / 100


@pytest.mark.parametrize("family", FAMILIES)
def test_two_photographs(family: str, dataset: tuple[str, list[dict[str, Any]]]) -> None:
    check_learning(instantiate(tiny_config(family)), *dataset)


@pytest.mark.parametrize("backbone", TRANSFORMERS)
def test_transformers_as_backbones(
    backbone: str, dataset: tuple[str, list[dict[str, Any]]]
) -> None:
    family = FAMILY_OF_TRANSFORMER[backbone]
    features = dict(backbone=TRANSFORMERS[backbone], in_features=["p1", "p2", "p3"])
    check_learning(instantiate(tiny_config(family, **features)), *dataset)


def check_learning(model: EfficientDETR, name: str, batch: list[dict[str, Any]]) -> None:
    history = overfit(model, batch)
    precision = average_precision(model, batch, name)
    assert history[-1] < 0.3 * history[0]
    assert precision > 0.9
