"""torchvision's names of a ResNet -> Detectron2's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from torch import Tensor

from efficient_detr.checkpoint.conversion import read_keys, write_keys
from efficient_detr.checkpoint.resnet import torchvision_resnet
from tests.building import without_storage
from tests.checkpoint.manifest_files import load_manifest

BACKBONES = Path(__file__).parents[2] / "configs" / "common" / "models" / "backbones.py"
BODY = "backbone.0.body."


def published(depth: int) -> dict[str, Tensor]:
    """A backbone without storage, from the list of a detector's keys."""
    shapes = load_manifest(f"official_detr_r{depth}").shapes
    return {
        key.removeprefix(BODY): torch.empty(shape, device="meta")
        for key, shape in shapes.items()
        if key.startswith(BODY)
    }


@pytest.mark.parametrize("depth", [50, 101])
def test_a_resnet_is_filled(depth: int) -> None:
    found = read_keys(published(depth), torchvision_resnet())
    model = without_storage(LazyConfig.load(str(BACKBONES), "resnet")(depth, ["res5"], 2))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.state.items()} == expected
    assert found.unknown == [] and found.dropped == {}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("bn1.running_var", "stem.conv1.norm.running_var"),
        ("layer1.0.downsample.0.weight", "res2.0.shortcut.weight"),
        ("layer1.0.downsample.1.bias", "res2.0.shortcut.norm.bias"),
        ("layer3.22.bn3.weight", "res4.22.conv3.norm.weight"),
        ("layer4.1.conv2.weight", "res5.1.conv2.weight"),
    ],
)
def test_names(theirs: str, ours: str) -> None:
    tensor = torch.zeros(1)
    assert read_keys({theirs: tensor}, torchvision_resnet()).state == {ours: tensor}
    assert write_keys({ours: tensor}, torchvision_resnet()) == {theirs: tensor}


COUNTERS = [
    f"{norm}.num_batches_tracked" for norm in ("bn1", "layer2.1.bn2", "layer2.0.downsample.1")
]


def test_the_classifier_and_counters_have_no_place() -> None:
    keys = [*COUNTERS, "fc.weight", "fc.bias"]
    found = read_keys({key: torch.zeros(1) for key in keys}, torchvision_resnet())
    assert found.state == {} and list(found.dropped) == keys


def test_a_model_that_counts_batches_gets_their_number() -> None:
    known = ("res3.1.conv2.norm.num_batches_tracked",)
    found = read_keys({key: torch.zeros(1) for key in COUNTERS}, torchvision_resnet(), known)
    assert tuple(found.state) == known


def test_other_keys_are_unknown() -> None:
    keys = ["layer5.0.conv1.weight", "layer1.0.se.weight", "body.conv1.weight"]
    assert read_keys({key: torch.zeros(1) for key in keys}, torchvision_resnet()).unknown == keys
