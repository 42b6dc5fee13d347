"""DAT under Detectron2's own detectors, where its RetinaNet and Mask R-CNN are to be had.

Elsewhere the configs cannot be loaded, and what they say about it is tested.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import train_net
from efficient_detr.modeling.backbones.dat import DAT

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDER = CONFIGS / "detectron2"
NAMES = sorted(path.name for path in FOLDER.glob("*.py"))


def importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def operators_run() -> bool:
    """Whether torchvision's compiled operators, on which region proposals stand, can be used."""
    try:
        boxes = importlib.import_module("torchvision.ops")
        boxes.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, NotImplementedError):
        return False
    return True


HAS_MODELS = importable("detectron2.model_zoo")
needs_models = pytest.mark.skipif(not HAS_MODELS, reason="Detectron2's own detectors are missing")


@functools.cache
def model_of(name: str) -> Any:
    """The detector with random weights, in training."""
    torch.manual_seed(0)
    return instantiate(LazyConfig.load(str(FOLDER / name)).model)


def test_the_list_of_configs() -> None:
    assert NAMES == ["mask_rcnn_dat_tiny.py", "retinanet_dat_tiny.py"]


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_starts_with_a_command(name: str) -> None:
    text = ast.get_docstring(ast.parse((FOLDER / name).read_text())) or ""
    commands = re.findall(r"python train_net\.py --config-file configs/(\S+)", text)
    assert commands == [f"detectron2/{name}"]


@pytest.mark.skipif(HAS_MODELS, reason="Detectron2's own detectors are here")
@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_a_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_net.main(["--config-file", str(FOLDER / name)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{name} cannot be loaded" in error
    assert "install the real Detectron2 (github.com/facebookresearch/detectron2)" in error


@needs_models
@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_yaml(name: str, tmp_path: Path) -> None:
    config = LazyConfig.load(str(FOLDER / name))
    assert config.keys() >= {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    assert config.train.output_dir == f"output/{name.removesuffix('.py')}"
    path = tmp_path / "config.yaml"
    LazyConfig.save(config, str(path))
    reloaded = LazyConfig.load(str(path))
    with torch.device("meta"):
        backbone = instantiate(reloaded.model.backbone)
    assert isinstance(backbone.bottom_up, DAT)
    assert reloaded.model.input_format == reloaded.dataloader.train.mapper.image_format == "RGB"


@needs_models
@torch.no_grad()
def test_the_pyramid_of_retinanet() -> None:
    """Strides 8 to 128; the last two levels come from the backbone's last map."""
    backbone = model_of("retinanet_dat_tiny.py").backbone.eval()
    assert backbone.size_divisibility == 32
    maps = backbone(torch.randn(1, 3, 64, 128))
    assert {name: tuple(features.shape[2:]) for name, features in maps.items()} == {
        "p3": (8, 16),
        "p4": (4, 8),
        "p5": (2, 4),
        "p6": (1, 2),
        "p7": (1, 1),
    }
    assert backbone.top_block.p6.in_channels == 768


@needs_models
@torch.no_grad()
def test_the_pyramid_of_mask_rcnn() -> None:
    backbone = model_of("mask_rcnn_dat_tiny.py").backbone.eval()
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert {name: tuple(features.shape[2:]) for name, features in maps.items()} == {
        "p2": (16, 16),
        "p3": (8, 8),
        "p4": (4, 4),
        "p5": (2, 2),
        "p6": (1, 1),
    }


def image_with_an_object() -> dict[str, Any]:
    structures = importlib.import_module("detectron2.structures")
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 61, 75), dtype=torch.uint8, generator=generator)
    instances = Instances((61, 75))
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 8.0, 45.0, 50.0]]))
    instances.gt_classes = torch.tensor([3])
    mask = torch.zeros(1, 61, 75, dtype=torch.bool)
    mask[:, 8:50, 5:45] = True
    instances.gt_masks = structures.BitMasks(mask)
    return {"image": image, "height": 61, "width": 75, "instances": instances}


@needs_models
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_training_and_a_prediction(name: str) -> None:
    """Every trained parameter gets a gradient, and none leaves the optimizer."""
    if name.startswith("mask_rcnn") and not operators_run():
        pytest.skip("torchvision's operators cannot be used")
    model, config = model_of(name).train(), LazyConfig.load(str(FOLDER / name))
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    with EventStorage():
        losses = model([image_with_an_object()])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    grouped = sum(len(group["params"]) for group in optimizer.param_groups)
    assert grouped == sum(p.requires_grad for p in model.parameters())
    optimizer.step()
    if operators_run():
        with torch.no_grad():
            (output,) = model.eval()([image_with_an_object()])
        assert output["instances"].image_size == (61, 75)
