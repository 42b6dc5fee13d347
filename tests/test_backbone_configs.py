"""The classifiers of configs/backbones: they load, survive YAML, and cost what is published.

Numbers of parameters and of multiply-adds are those of the official implementations with their
head of 1000 classes, counted by fvcore.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from efficient_detr.data.center_square import CenterSquare
from efficient_detr.engine.checks import check_arguments
from efficient_detr.evaluation import count_flops
from efficient_detr.modeling.backbones.dat_variants import VARIANTS
from efficient_detr.modeling.classifier import ImageClassifier
from tests.building import without_storage

CONFIGS = Path(__file__).parents[1] / "configs" / "backbones"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))

# parameters, billions of multiply-adds, side of the image
PUBLISHED = {
    "dat_tiny": (28_319_138, 4.589, 224),
    "dat_small": (49_700_402, 9.008, 224),
    "dat_base": (87_881_632, 15.788, 224),
    "dat_base_384": (88_178_272, 49.772, 384),
    "dat_plus_plus_tiny": (23_962_876, 4.288, 224),
    "dat_plus_plus_small": (53_127_366, 9.426, 224),
    "dat_plus_plus_base": (93_690_640, 16.559, 224),
    "dat_plus_plus_base_384": (93_690_640, 49.734, 384),
    # The backbone alone, with four norms: 4.511. Its first three norms, of 56 * 56 * 96, 28 * 28 *
    # 192 and 14 * 14 * 384 elements at 5 each, are 2.63e6 too many; the head adds 0.77e6.
    "swin_tiny": (28_288_354, 4.511 - 0.00263 + 0.00077, 224),
}


def load(name: str) -> Any:
    return LazyConfig.load(str(CONFIGS / f"{name}.py"))


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text())) or ""


def test_the_list_of_configs() -> None:
    assert set(NAMES) == PUBLISHED.keys()
    assert VARIANTS.keys() == PUBLISHED.keys() - {"swin_tiny"}


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name: str) -> None:
    """A command with this config, quoted figures, and counts that the other tests check."""
    text = docstring(name)
    command = f"python tools/classify.py --config-file configs/backbones/{name}.py"
    assert command in text
    assert re.search(r"Quoted from the authors: \d\d\.\d+ % top-1", text)
    parameters, flops, side = PUBLISHED[name]
    counted = f"Here {parameters:,} parameters and {flops:.3f} GFLOPs at {side}x{side}."
    assert counted in text


@pytest.mark.parametrize("name", NAMES)
def test_config(name: str, tmp_path: Path) -> None:
    """Through YAML and back, with seven classes."""
    config = LazyConfig.apply_overrides(load(name), ["model.num_classes=7"])
    assert config.keys() == {"model", "preprocessing", "train"}
    assert {"device", "init_checkpoint"} <= config.train.keys()
    path = tmp_path / "config.yaml"
    LazyConfig.save(config, str(path))
    reloaded = LazyConfig.load(str(path))
    check_arguments(reloaded)
    model = without_storage(reloaded.model)
    assert isinstance(model, ImageClassifier)
    assert (model.num_classes, model.head.out_features) == (7, 7)
    assert list(model.backbone.output_shape()) == ["p3"]
    preprocessing = instantiate(reloaded.preprocessing)
    assert isinstance(preprocessing, CenterSquare)
    assert preprocessing.image_size == PUBLISHED[name][2]
    if name in VARIANTS:
        assert preprocessing.image_size == VARIANTS[name].image_size


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str) -> None:
    model = without_storage(load(name).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][0]


@pytest.mark.parametrize("name", ["dat_tiny", "dat_plus_plus_tiny", "swin_tiny"])
def test_multiply_adds(name: str) -> None:
    _, flops, side = PUBLISHED[name]
    model = instantiate(load(name).model)
    image = {"image": torch.zeros(3, side, side, dtype=torch.uint8)}
    assert count_flops(model, [image]).total / 1e9 == pytest.approx(flops, rel=1e-3)
