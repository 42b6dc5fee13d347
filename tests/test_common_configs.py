"""The building blocks in configs/common: optimizer, schedules, augmentations, evaluation."""

from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig
from torch import nn

from efficient_detr.engine.optim import backbone_lr_factor, deformable_lr_factor

COMMON = Path(__file__).parents[1] / "configs" / "common"


def load(name: str, key: str) -> Any:
    return LazyConfig.load(str(COMMON / f"{name}.py"), key)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("detector.backbone.res2.0.conv1.weight", 0.1),
        ("backbone.stem.conv1.weight", 0.1),
        ("detector.encoder.layers.0.norm.weight", 1.0),
        ("detector.backbone_neck.weight", 1.0),
    ],
)
def test_the_backbone_learns_ten_times_slower(name: str, factor: float) -> None:
    assert backbone_lr_factor(name) == factor


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("detector.backbone.res3.0.conv1.weight", 0.1),
        ("detector.decoder.layers.0.cross_attention.sampling_offsets.bias", 0.1),
        ("detector.queries.reference_points.weight", 0.1),
        ("detector.decoder.layers.0.cross_attention.attention_weights.bias", 1.0),
        ("detector.queries.embedding", 1.0),
    ],
)
def test_layers_that_say_where_to_look_learn_ten_times_slower(name: str, factor: float) -> None:
    assert deformable_lr_factor(name) == factor


@pytest.mark.parametrize(("name", "lr"), [("detr_adamw", 1e-4), ("deformable_adamw", 2e-4)])
def test_every_parameter_decays_in_the_official_training(name: str, lr: float) -> None:
    config = load("optim", name)
    config.params.model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    optimizer = instantiate(config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 1e-4]
    rates = sorted(group["lr"] for group in optimizer.param_groups)
    assert rates == pytest.approx([0.1 * lr, lr])


def test_groups_of_the_optimizer() -> None:
    # Learning rates 1e-4 and 1e-5 (backbone); weight decay 1e-4, and 0 for normalizations.
    conv, group_norm = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)
    linear, layer_norm = nn.Linear(4, 4), nn.LayerNorm(4)
    conv.requires_grad_(False).weight.requires_grad_(True)
    model = nn.ModuleDict(
        {
            "backbone": nn.Sequential(conv, group_norm),
            "encoder": nn.Sequential(linear, layer_norm),
        }
    )
    config = load("optim", "AdamW")
    config.params.model = model
    optimizer = instantiate(config)
    assert isinstance(optimizer, torch.optim.AdamW)
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == 7, "the frozen bias has no group"
    assert found[conv.weight] == pytest.approx((1e-5, 1e-4))
    assert found[group_norm.weight] == pytest.approx((1e-5, 0.0))
    assert found[linear.bias] == pytest.approx((1e-4, 1e-4))
    assert found[layer_norm.bias] == pytest.approx((1e-4, 0.0))


def test_the_backbone_follows_an_override_of_the_learning_rate() -> None:
    config = load("optim", "AdamW")
    config.lr = 2e-4
    config.params.model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    rates = sorted(group["lr"] for group in instantiate(config).param_groups)
    assert rates == pytest.approx([2e-5, 2e-4])


@pytest.mark.parametrize(
    ("name", "epochs", "decay"),
    [
        ("12ep", 12, 11),
        ("24ep", 24, 20),
        ("36ep", 36, 30),
        ("50ep", 50, 40),
        ("300ep", 300, 200),
        ("500ep", 500, 400),
    ],
)
def test_step_schedules(name: str, epochs: int, decay: int) -> None:
    schedule = instantiate(load("schedule", f"lr_multiplier_{name}"))
    max_iter, step = epochs * 7500, decay * 7500
    # fvcore rounds the progress up by a millionth: 2.25 iterations of 300 epochs.
    multipliers = [schedule(i / max_iter) for i in (0, step - 5, step, max_iter - 1)]
    assert multipliers == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_the_schedule_with_warm_up() -> None:
    # Linear from 0.001 to 1 over 1,000 iterations: 0.5005 in the middle.
    schedule = instantiate(load("schedule", "lr_multiplier_3x"))
    at = (0, 500, 1000, 209_999, 210_001, 249_999, 250_001, 269_999)
    multipliers = [schedule(i / 270_000) for i in at]
    assert multipliers == pytest.approx([0.001, 0.5005, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_sizes_in_training_and_evaluation() -> None:
    dataloader = load("data/coco_detr", "dataloader")
    plain = instantiate(dataloader.train.mapper.augmentations)
    crop = instantiate(dataloader.train.mapper.crop_augmentations)
    assert [type(a) for a in plain] == [T.RandomFlip, T.ResizeShortestEdge]
    assert [type(a) for a in crop] == [
        T.RandomFlip,
        T.ResizeShortestEdge,
        T.RandomCrop,
        T.ResizeShortestEdge,
    ]
    assert list(plain[1].short_edge_length) == list(range(480, 801, 32))
    (resize,) = instantiate(dataloader.test.mapper.augmentations)
    # 640x480 -> short side 800; a long picture is limited to 1333.
    assert T.ResizeShortestEdge.get_output_shape(480, 640, 800, resize.max_size) == (800, 1067)
    assert T.ResizeShortestEdge.get_output_shape(480, 960, 800, resize.max_size)[1] == 1333
    assert dataloader.train.total_batch_size == 16


def test_the_channel_order_of_evaluation_follows_training() -> None:
    dataloader = load("data/coco_detr", "dataloader")
    dataloader.train.mapper.image_format = "BGR"
    assert dataloader.test.mapper.image_format == "BGR"


def test_the_common_configs_can_be_saved_and_loaded(tmp_path: Path) -> None:
    """No lambda, no closure: yaml alone brings them back."""
    config = {
        "dataloader": load("data/coco_detr", "dataloader"),
        "optimizer": load("optim", "AdamW"),
        "lr_multiplier": load("schedule", "lr_multiplier_12ep"),
        "train": load("train", "train"),
    }
    path = tmp_path / "config.yaml"
    LazyConfig.save(DictConfig(config, flags={"allow_objects": True}), str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"], "no pickle beside it"
    again = LazyConfig.load(str(path))
    assert again.dataloader.evaluator.dataset_name == "coco_2017_val"
    assert again.dataloader.train.seed == 42
    assert instantiate(again.lr_multiplier)(0.95) == pytest.approx(0.1)
