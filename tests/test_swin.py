"""Swin backbones of the configs: their sizes and cost, and a detector over one of them."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import SwinTransformer
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

from tests.building import without_storage
from tests.tiny_models import image_input, tiny_model

CONFIGS = Path(__file__).parents[1] / "configs"

# Of Detectron2's with all four outputs: parameters and 1e9 multiply-adds for 224 x 224 pixels.
SIZES = {
    "tiny": (27_520_698, 4.511),
    "small": (48_838_602, 8.770),
    "base": (86_745_016, 15.470),
    "base_384": (86_880_376, 25.534),
    "large_384": (195_201_204, 55.854),
}


def swin(size: str, **options: Any) -> Any:
    make = LazyConfig.load(str(CONFIGS / "common" / "models" / "backbones.py"), "swin")
    return make(size, out_indices=(0, 1, 2, 3), drop_path_rate=0.0, **options)


def count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def gflops(backbone: nn.Module, height: int, width: int) -> float:
    with torch.no_grad():
        analysis = FlopCountAnalysis(backbone.eval(), torch.zeros(1, 3, height, width))
        total = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
    return float(total) / 1e9


@pytest.mark.parametrize("size", SIZES)
def test_parameters(size: str) -> None:
    backbone = without_storage(swin(size))
    assert count(backbone) == SIZES[size][0]
    channels = {"tiny": 96, "small": 96, "base": 128, "base_384": 128, "large_384": 192}[size]
    shapes = [(shape.channels, shape.stride) for shape in backbone.output_shape().values()]
    assert shapes == [(channels * 2**stage, 4 * 2**stage) for stage in range(4)]


@pytest.mark.parametrize("size", ["tiny", "small", "base", "base_384"])
def test_cost_of_an_image_of_imagenet(size: str) -> None:
    assert gflops(instantiate(swin(size)), 224, 224) == pytest.approx(SIZES[size][1], rel=1e-4)


def test_cost_of_an_image_of_coco() -> None:
    """Swin's own 267 GFLOPs of Mask R-CNN are these and 171 for the rest of it."""
    assert gflops(instantiate(swin("tiny")), 800, 1280) == pytest.approx(95.997, rel=1e-4)


def test_drop_path_of_the_table_can_be_replaced() -> None:
    make = LazyConfig.load(str(CONFIGS / "common" / "models" / "backbones.py"), "swin")
    rates = [make("tiny").drop_path_rate, make("small").drop_path_rate]
    assert rates + [make("small", drop_path_rate=0.0).drop_path_rate] == [0.1, 0.2, 0.0]


# detrex's model with ResNet-50, a backbone whose stem is frozen, and what changes with Swin: the
# backbone without the norm of "p0", and a neck whose four convolutions (1x1 from each map, 3x3 from
# the last) have other inputs.
RESNET, RESNET_NECK = 23_454_912, 256 * (512 + 1024 + 2048 + 9 * 2048)


@pytest.mark.parametrize(
    ("config", "with_resnet", "size", "channels"),
    [
        ("focus_detr_swin_tiny.py", 49_339_920, "tiny", 96),
        ("focus_detr_swin_base_384.py", 49_339_920, "base_384", 128),
        ("dino_swin_tiny.py", 47_650_316, "tiny", 96),
    ],
)
def test_parameters_of_detectors(config: str, with_resnet: int, size: str, channels: int) -> None:
    neck = 256 * channels * (2 + 4 + 8 + 9 * 8)
    backbone = SIZES[size][0] - 2 * channels
    model = without_storage(LazyConfig.load(str(CONFIGS / config)).model)
    assert count(model.detector.backbone) == backbone
    assert count(model) == with_resnet - RESNET - RESNET_NECK + backbone + neck
    assert count(model, trained=True) == count(model), "nothing is frozen"


def test_sparse_detr_with_swin(tmp_path: Path) -> None:
    """The config that the docstring of Sparse DETR shows has the 41.4 M parameters quoted there.

    They are counted without what is frozen and without the heads on encoder layers.
    """
    shutil.copytree(CONFIGS, tmp_path / "configs")
    lines = (CONFIGS / "sparse_detr.py").read_text().split('"""')[1].splitlines()
    shown = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    code = shown[shown.index("from .common") :]
    (tmp_path / "configs" / "sparse_detr_swin.py").write_text(code)
    config = LazyConfig.load(str(tmp_path / "configs" / "sparse_detr_swin.py"))
    assert {"dataloader", "lr_multiplier", "model", "optimizer", "train"} <= config.keys()
    model = without_storage(config.model)
    frozen = count(model.detector.backbone) - count(model.detector.backbone, trained=True)
    # The patch embedding (48 weights and a bias for each of 96 channels, and a norm), two blocks
    # with 3 x 169 biases each, and the merging.
    block = 12 * 96**2 + 13 * 96 + 3 * 169
    assert frozen == 51 * 96 + 2 * block + 8 * 96**2 + 8 * 96
    heads = count(model.detector.encoder_heads, trained=True)
    # 80 classes instead of the authors' 91, in the 7 heads that are counted.
    assert round((count(model, trained=True) - heads + 7 * 11 * 257) / 1e6, 1) == 41.4


def test_a_detector_over_swin_takes_images_of_any_size() -> None:
    """Images are padded to the largest, not to a multiple of 32."""
    backbone = L(SwinTransformer)(
        embed_dim=8,
        depths=[1, 2, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=3,
        drop_path_rate=0.0,
        out_indices=[1, 2, 3],
    )
    torch.manual_seed(0)
    model = tiny_model(
        "focus_detr", backbone=backbone, in_features=["p1", "p2", "p3"], in_channels=[16, 32, 64]
    )
    batch = [
        image_input(61, 75, [[10, 10, 60, 40], [30, 20, 70, 60]], [1, 4]),
        image_input(48, 64, [[0, 0, 64, 48]], [0]),
    ]
    assert model.preprocess(batch).tensor.shape == (2, 3, 61, 75)
    losses = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    first = model.detector.backbone.get_parameter("patch_embed.proj.weight").grad
    assert first is not None and first.isfinite().all() and first.abs().sum() > 0
    with torch.no_grad():
        results = model.eval()(batch)
    assert [result["instances"].image_size for result in results] == [(61, 75), (48, 64)]
    assert all(result["instances"].scores.isfinite().all() for result in results)
