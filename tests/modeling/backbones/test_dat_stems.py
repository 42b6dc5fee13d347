"""Stems and what lies between stages: sizes, arithmetic, and maps that are too small."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_detr.modeling.backbones.dat_stems import (
    ConvolutionalMerging,
    ConvolutionalStem,
    NormalizedConvolution,
    OverlappingPatchStem,
    PatchMerging,
    PatchStem,
)

SIDES = [4, 5, 7, 8, 61, 75]


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def normalised(features: Tensor) -> Tensor:
    """Over the channels of each cell, without scale and shift."""
    centred = features - features.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_each_cell_is_normalised_over_its_channels() -> None:
    torch.manual_seed(0)
    layer = NormalizedConvolution(in_channels=3, channels=8, kernel_size=3, stride=2, padding=1)
    features = torch.randn(2, 6, 9, 3)
    convolved = F.conv2d(
        features.permute(0, 3, 1, 2),
        layer.convolution.weight,
        layer.convolution.bias,
        stride=2,
        padding=1,
    )
    expected = normalised(convolved.permute(0, 2, 3, 1))
    torch.testing.assert_close(layer(features), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("height", SIDES)
@pytest.mark.parametrize("width", SIDES[1:3])
def test_sizes(height: int, width: int) -> None:
    """Patches round down; what is padded rounds up, in each of its steps."""
    images = torch.randn(1, height, width, 3)
    assert PatchStem(channels=6)(images).shape == (1, height // 4, width // 4, 6)
    ceiled = (1, math.ceil(height / 4), math.ceil(width / 4), 6)
    assert OverlappingPatchStem(channels=6)(images).shape == ceiled
    assert ConvolutionalStem(channels=6)(images).shape == ceiled
    patches = PatchMerging(in_channels=3, channels=4)(images)
    assert patches.shape == (1, height // 2, width // 2, 4)
    merged = ConvolutionalMerging(in_channels=3, channels=4)(images)
    assert merged.shape == (1, math.ceil(height / 2), math.ceil(width / 2), 4)


@torch.no_grad()
def test_a_patch_stem_sees_only_whole_patches() -> None:
    torch.manual_seed(0)
    stem = PatchStem(channels=6)
    images = torch.randn(1, 11, 10, 3)
    torch.testing.assert_close(stem(images), stem(images[:, :8, :8]))


def test_parameters() -> None:
    """Stems have biases, what lies between stages has none; kernels are 4, 7, 3 and 3, 2, 3."""
    norm = {"norm.weight": (8,), "norm.bias": (8,)}
    convolution = {"convolution.bias": (8,)}
    assert shapes(PatchStem(channels=8)) == {
        "convolution.weight": (8, 3, 4, 4),
        **convolution,
        **norm,
    }
    assert shapes(OverlappingPatchStem(channels=8)) == {
        "convolution.weight": (8, 3, 7, 7),
        **convolution,
        **norm,
    }
    assert shapes(ConvolutionalStem(channels=8)) == {
        "first.convolution.weight": (4, 3, 3, 3),
        "first.convolution.bias": (4,),
        "first.norm.weight": (4,),
        "first.norm.bias": (4,),
        "second.convolution.weight": (8, 4, 3, 3),
        "second.convolution.bias": (8,),
        "second.norm.weight": (8,),
        "second.norm.bias": (8,),
    }
    assert shapes(PatchMerging(in_channels=5, channels=8)) == {
        "convolution.weight": (8, 5, 2, 2),
        **norm,
    }
    assert shapes(ConvolutionalMerging(in_channels=5, channels=8)) == {
        "convolution.weight": (8, 5, 3, 3),
        **norm,
    }


@torch.no_grad()
def test_gelu_lies_between_the_convolutions_of_the_stem() -> None:
    torch.manual_seed(0)
    stem = ConvolutionalStem(channels=8)
    images = torch.randn(1, 9, 9, 3)
    torch.testing.assert_close(stem(images), stem.second(F.gelu(stem.first(images))))


@pytest.mark.parametrize(("height", "width"), [(3, 8), (8, 3)])
def test_an_image_without_a_patch(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height}x{width} .* too small .* 32 pixels"):
        PatchStem(channels=8)(torch.zeros(1, height, width, 3))


def test_the_smallest_map_that_convolutions_take() -> None:
    """One cell and its padding fill a 3x3 kernel."""
    merged = ConvolutionalMerging(in_channels=3, channels=4)(torch.zeros(1, 1, 1, 3))
    assert merged.shape == (1, 1, 1, 4)
    with pytest.raises(ValueError, match="1x1"):
        PatchMerging(in_channels=3, channels=4)(torch.zeros(1, 1, 1, 3))
