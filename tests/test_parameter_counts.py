"""Full-size models have as many parameters as the official implementations.

The totals were counted in the official code: facebookresearch/detr (DETR), fundamentalvision/
Deformable-DETR, kakaobrain/sparse-detr, gaopengcuhk/SMCA-DETR and the DETR that ACT clusters, all
with a ResNet of torchvision's whose stem and first stage (222,400 weights) and batch norms are
frozen. Deformable DETR's heads that several layers share count once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from detectron2.config import LazyConfig, instantiate
from torch import nn

from tests.building import without_storage

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = CONFIGS / "common" / "models"
FROZEN = 222_400

SINGLE = dict(in_features=["res5"], in_channels=[2048], num_levels=1)

# Name: (file, function, arguments, backbone as (function, arguments), official total).
# "backbone" of None is the default of the function.
OFFICIAL: dict[str, tuple[str, str, dict[str, Any], tuple[str, tuple[Any, ...]] | None, int]] = {
    "detr_r50": ("detr", "detr", {}, None, 41_524_768),
    "detr_r50_dc5": ("detr", "detr", {}, ("resnet_dc5", (50,)), 41_524_768),
    "detr_r101": ("detr", "detr", {}, ("resnet", (101, ["res5"], 2)), 60_464_672),
    "deformable_detr_r50_single_scale": (
        "deformable_detr",
        "deformable_detr",
        SINGLE,
        ("resnet", (50, ["res5"], 2)),
        34_066_593,
    ),
    "deformable_detr_r50_single_scale_dc5": (
        "deformable_detr",
        "deformable_detr",
        SINGLE,
        ("resnet_dc5", (50,)),
        34_066_593,
    ),
    "deformable_detr_r50": ("deformable_detr", "deformable_detr", {}, None, 40_069_665),
    "deformable_detr_r50_refine": (
        "deformable_detr",
        "deformable_detr_refine",
        {},
        None,
        40_849_660,
    ),
    "deformable_detr_r50_refine_two_stage": (
        "deformable_detr",
        "deformable_detr_two_stage",
        {},
        None,
        41_181_529,
    ),
    "sparse_detr_r50_rho_0.1": (
        "sparse_detr",
        "sparse_detr",
        dict(keep_ratio=0.1),
        None,
        41_937_205,
    ),
    "sparse_detr_r50_rho_0.3": (
        "sparse_detr",
        "sparse_detr",
        dict(keep_ratio=0.3),
        None,
        41_937_205,
    ),
    "act_detr_r50": ("act_detr", "act_detr", {}, None, 41_524_768),
    "act_detr_r50_dc5": ("act_detr", "act_detr", {}, ("resnet_dc5", (50,)), 41_524_768),
    # SMCA's classifier has 92 columns, all of them sigmoid classes.
    "smca_single_scale": ("smca", "smca", dict(num_classes=92), None, 41_760_482),
    "smca_multi_scale": ("smca", "smca_multi_scale", dict(num_classes=92), None, 39_752_308),
    "smca_conv_kernel_7_shared": (
        "smca",
        "smca_conv",
        dict(num_classes=92, kernel_size=7, shared=True, encoder_layers=6),
        None,
        40_985_914,
    ),
    "smca_conv_kernel_5": (
        "smca",
        "smca_conv",
        dict(num_classes=92, kernel_size=5, shared=False, encoder_layers=5),
        None,
        40_199_738,
    ),
}


def built(config: Any) -> nn.Module:
    """The model without storage for its weights."""
    model: nn.Module = without_storage(config)
    return model


def official_model(name: str) -> nn.Module:
    """The model of a name in `OFFICIAL`, with the authors' number of classes."""
    file, function, arguments, backbone, _ = OFFICIAL[name]
    arguments = {"num_classes": 91, **arguments}
    if backbone is not None:
        make = LazyConfig.load(str(MODELS / "backbones.py"), backbone[0])
        arguments["backbone"] = make(*backbone[1])
    return built(LazyConfig.load(str(MODELS / f"{file}.py"), function)(**arguments))


def count(model: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_count(name: str) -> None:
    model, expected = official_model(name), OFFICIAL[name][-1]
    assert count(model) == expected
    assert count(model, trained=True) == expected - FROZEN


# A class is a row of 256 weights and a bias in each classifier: a shared one, or one for each of
# the 6 decoder layers and then for the proposals and 5 encoder layers. Sparse DETR's config has 80
# classes instead of 91; SMCA's 80 instead of 92.
ROW = 257
SHIPPED = {
    "detr.py": ("detr_r50", 11 * 1),
    "detr_dc5.py": ("detr_r50_dc5", 11 * 1),
    "deformable_detr.py": ("deformable_detr_r50", 11 * 1),
    "deformable_detr_single_scale.py": ("deformable_detr_r50_single_scale", 11 * 1),
    "deformable_detr_refine.py": ("deformable_detr_r50_refine", 11 * 6),
    "deformable_detr_two_stage.py": ("deformable_detr_r50_refine_two_stage", 11 * 7),
    "sparse_detr.py": ("sparse_detr_r50_rho_0.3", 11 * 12),
    "act_detr.py": ("act_detr_r50", 11 * 1),
    "smca_detr.py": ("smca_single_scale", 12 * 1),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_count(name: str) -> None:
    """The configs predict COCO's 80 classes rather than 91 category numbers with gaps."""
    official, fewer_rows = SHIPPED[name]
    model = built(LazyConfig.load(str(CONFIGS / name)).model)
    expected = OFFICIAL[official][-1] - fewer_rows * ROW
    assert count(model) == expected
    assert count(model, trained=True) == expected - FROZEN


# Tensors with their own learning rate in the official optimiser: (rest, backbone, sampling).
@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("deformable_detr_single_scale.py", (218, 42, 26)),
        ("deformable_detr.py", (230, 42, 26)),
        ("deformable_detr_two_stage.py", (285, 42, 24)),
    ],
)
def test_official_parameter_groups(name: str, tensors: tuple[int, int, int]) -> None:
    config = LazyConfig.load(str(CONFIGS / name))
    config.optimizer.params.model = built(config.model)
    groups = instantiate(config.optimizer.params)
    found = {f"{group['lr']:.0e}": len(group["params"]) for group in groups}
    rest, backbone, sampling = tensors
    assert found == {"2e-04": rest, "2e-05": backbone + sampling}
    assert not any("weight_decay" in group for group in groups), "the optimiser's, for every one"
