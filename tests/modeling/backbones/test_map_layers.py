"""Small layers for channels-last maps, against PyTorch's own and against arithmetic by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficient_detr.modeling.backbones.map_layers import (
    DepthwiseConvolution,
    DropPath,
    LayerScale,
    MapConvolution,
    MapFeedForward,
    ResidualDepthwiseConvolution,
)


def test_a_convolution_of_channels_last_maps() -> None:
    torch.manual_seed(0)
    layer = MapConvolution(3, 5, kernel_size=3, stride=2, padding=1, bias=False)
    features = torch.randn(2, 7, 10, 3)
    expected = F.conv2d(features.permute(0, 3, 1, 2), layer.weight, stride=2, padding=1)
    torch.testing.assert_close(layer(features), expected.permute(0, 2, 3, 1))


def test_a_depthwise_convolution_by_hand() -> None:
    """A kernel of a single 1 left of the centre moves the map to the right; channels do not mix."""
    layer = DepthwiseConvolution(channels=2)
    assert layer.weight.shape == (2, 1, 3, 3)
    with torch.no_grad():
        layer.weight.zero_()[0, 0, 1, 0] = 1.0
        layer.weight[1, 0, 1, 1] = 3.0
        layer.get_parameter("bias").copy_(torch.tensor([0.0, 0.5]))
    features = torch.arange(12.0).reshape(1, 2, 3, 2)
    first, second = features.unbind(-1)
    moved = F.pad(first, (1, 0))[..., :3]
    torch.testing.assert_close(layer(features), torch.stack([moved, 3 * second + 0.5], -1))


def test_the_residual_keeps_the_map() -> None:
    torch.manual_seed(0)
    layer = ResidualDepthwiseConvolution(channels=4)
    features = torch.randn(2, 5, 6, 4)
    convolved = DepthwiseConvolution.forward(layer, features)
    torch.testing.assert_close(layer(features), features + convolved)
    assert not torch.equal(layer(features), features)


def test_the_feedforward_network() -> None:
    """W2 GELU(mixing(W1 x)), exact GELU."""
    torch.manual_seed(0)
    features = torch.randn(2, 3, 4, 6)
    plain = MapFeedForward(channels=6, hidden_channels=24)
    expected = plain.contract(F.gelu(plain.expand(features)))
    torch.testing.assert_close(plain(features), expected)
    mixing = ResidualDepthwiseConvolution(channels=24)
    mixed = MapFeedForward(channels=6, hidden_channels=24, mixing=mixing)
    expected = mixed.contract(F.gelu(mixing(mixed.expand(features))))
    torch.testing.assert_close(mixed(features), expected)
    assert "mixing.weight" in mixed.state_dict()
    assert not any(key.startswith("mixing") for key in plain.state_dict())


def test_drop_path_drops_whole_images_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    dropped = DropPath(probability=0.25)(torch.ones(4000, 2, 3))
    kept = dropped.flatten(1)
    assert (kept == kept[:, :1]).all(), "an image is dropped as a whole"
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / 0.75]))
    # 3,000 of 4,000 expected, standard deviation sqrt(4000 * 0.25 * 0.75) = 27.
    assert abs(int((kept[:, 0] > 0).sum()) - 3000) < 140


def test_drop_path_passes_the_branch_through() -> None:
    branch = torch.randn(3, 2)
    assert DropPath(probability=0.0)(branch) is branch
    assert DropPath(probability=0.9).eval()(branch) is branch


def test_drop_path_says_its_probability() -> None:
    assert repr(DropPath(probability=0.3)) == "DropPath(probability=0.3)"


@pytest.mark.parametrize("probability", [1.0, -0.1, 1.5])
def test_drop_path_refuses_what_is_no_probability(probability: float) -> None:
    """At 1 the rest would be scaled by infinity."""
    with pytest.raises(ValueError, match=f"{probability}"):
        DropPath(probability=probability)


def test_layer_scale_is_a_factor_of_each_channel() -> None:
    layer = LayerScale(channels=3, initial_value=1e-2)
    assert isinstance(layer.weight, nn.Parameter)
    with torch.no_grad():
        layer.weight[1] = 2.0
    scaled = layer(torch.ones(1, 2, 2, 3))
    torch.testing.assert_close(scaled, torch.tensor([0.01, 2.0, 0.01]).expand(1, 2, 2, 3))
