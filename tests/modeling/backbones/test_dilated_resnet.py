"""The dilated ResNet of the DC5 models, against a convolution whose kernel has holes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones import dilated_resnet_stages

BACKBONES = Path(__file__).parents[3] / "configs" / "common" / "models" / "backbones.py"


def backbone(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return instantiate(LazyConfig.load(str(BACKBONES), name)(**arguments)).eval()


def with_holes(kernel: Tensor) -> Tensor:
    """A 3x3 kernel with a row and a column of zeros between its taps: 5x5, dilation 1."""
    spread = kernel.new_zeros(*kernel.shape[:2], 5, 5)
    spread[:, :, ::2, ::2] = kernel
    return spread


def normalised(features: Tensor, conv: Any, kernel: Tensor, padding: int = 0) -> Tensor:
    norm = conv.norm
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    shift = norm.bias - norm.running_mean * scale
    features = F.conv2d(features, kernel, padding=padding)
    return features * scale[:, None, None] + shift[:, None, None]


def res5_by_hand(stage: Any, features: Tensor) -> Tensor:
    """The arithmetic of torchvision's ResNet with `replace_stride_with_dilation` in its layer4.

    Its `_make_layer` gives the first block the dilation before the replacement, 1, and takes the
    stride from the block and from its projection; the blocks after it have dilation 2.
    """
    for index, block in enumerate(stage):
        kernel, padding = block.conv2.weight, 1
        if index > 0:
            kernel, padding = with_holes(kernel), 2
        branch = normalised(features, block.conv1, block.conv1.weight).relu()
        branch = normalised(branch, block.conv2, kernel, padding).relu()
        branch = normalised(branch, block.conv3, block.conv3.weight)
        if index == 0:
            features = normalised(features, block.shortcut, block.shortcut.weight)
        features = (features + branch).relu()
    return features


@torch.no_grad()
def test_the_last_stage_is_dilated_from_its_second_block_on() -> None:
    model = backbone("resnet_dc5", depth=50)
    for name, buffer in model.res5.named_buffers():  # statistics that are not 0 and 1
        buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_(std=0.1)
    features = torch.randn(2, 1024, 7, 9)
    found = model.res5(features.clone())
    assert found.shape == (2, 2048, 7, 9)
    torch.testing.assert_close(found, res5_by_hand(model.res5, features), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_only_the_resolution_of_the_last_stage_differs() -> None:
    """Same names and shapes of weights, same maps up to res4, twice the resolution after it."""
    plain, dilated = (
        backbone("resnet", depth=50, out_features=["res5"]),
        backbone("resnet_dc5", depth=50),
    )
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in dilated.state_dict().items()
    }
    assert plain.output_shape()["res5"].stride == 32
    assert dilated.output_shape()["res5"].stride == 16
    dilated.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 96)
    assert plain(image)["res5"].shape == (1, 2048, 2, 3)
    assert dilated(image)["res5"].shape == (1, 2048, 4, 6)


def test_the_depth_of_a_dilated_resnet() -> None:
    with torch.device("meta"):
        stages = dilated_resnet_stages(depth=101, norm="FrozenBN")
    assert [len(stage) for stage in stages] == [3, 4, 23, 3]
    with pytest.raises(ConfigError, match=r"depth=34 cannot be dilated: use 50, 101 or 152"):
        dilated_resnet_stages(depth=34)


@pytest.mark.parametrize(("freeze_at", "first"), [(1, "res2.0"), (2, "res3.0")])
def test_what_is_frozen(freeze_at: int, first: str) -> None:
    """The official DETRs train from res3 on, DINO from res2 on; batch norms are never trained."""
    with torch.device("meta"):
        model = backbone("resnet", depth=50, out_features=["res5"], freeze_at=freeze_at)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained[0].startswith(first)
    assert not any("norm" in name for name in trained)
    assert trained[-1].startswith("res5.2")
