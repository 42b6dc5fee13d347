"""Layers: frozen batch norm above all, since published backbones stand on it."""

import pytest
import torch
from detectron2.layers import (
    CNNBlockBase,
    Conv2d,
    FrozenBatchNorm2d,
    ShapeSpec,
    cat,
    get_norm,
)
from torch import nn


def frozen_with_statistics():
    norm = FrozenBatchNorm2d(2, eps=0.0)
    norm.weight.copy_(torch.tensor([2.0, 3.0]))
    norm.bias.copy_(torch.tensor([1.0, -1.0]))
    norm.running_mean.copy_(torch.tensor([4.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    return norm


@pytest.mark.parametrize("requires_grad", [False, True])
def test_frozen_batch_norm_by_hand(requires_grad):
    # Channel 0: (6 - 4) / sqrt(4) * 2 + 1 = 3; channel 1: 6 / sqrt(9) * 3 - 1 = 5.
    features = torch.full((1, 2, 1, 1), 6.0, requires_grad=requires_grad)
    output = frozen_with_statistics()(features)
    assert output.flatten().tolist() == pytest.approx([3, 5])
    if requires_grad:
        output.sum().backward()
        assert features.grad.flatten().tolist() == pytest.approx([1, 1])  # weight / sqrt(var)


def test_frozen_batch_norm_starts_as_identity_and_learns_nothing():
    norm = FrozenBatchNorm2d(3)
    features = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(norm(features), features)
    norm.train()(features)
    assert norm.running_mean.tolist() == [0, 0, 0]
    assert list(norm.parameters()) == []
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]


def test_frozen_batch_norm_keeps_half_precision():
    norm = frozen_with_statistics()
    features = torch.ones(1, 2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    assert norm(features).dtype == torch.bfloat16


def test_batch_norms_are_frozen_inside_modules():
    inner = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 4, 1), inner)
    model(torch.randn(2, 3, 4, 4))
    model.eval()
    features = torch.randn(1, 3, 4, 4)
    expected = model(features)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    assert frozen is model
    assert isinstance(inner[0], FrozenBatchNorm2d)
    torch.testing.assert_close(model(features), expected)
    assert isinstance(
        FrozenBatchNorm2d.convert_frozen_batchnorm(nn.BatchNorm2d(4)), FrozenBatchNorm2d
    )


def test_get_norm():
    kinds = {
        "BN": nn.BatchNorm2d,
        "SyncBN": nn.SyncBatchNorm,
        "FrozenBN": FrozenBatchNorm2d,
        "GN": nn.GroupNorm,
    }
    for name, kind in kinds.items():
        assert isinstance(get_norm(name, 64), kind)
    assert get_norm("GN", 64).num_groups == 32
    assert get_norm("", 64) is None
    assert get_norm(None, 64) is None
    assert isinstance(get_norm(nn.Identity, 64), nn.Identity)
    with pytest.raises(KeyError):
        get_norm("NoSuchNorm", 64)


def test_layer_norm_normalises_channels():
    norm = get_norm("LN", 2)
    assert norm is not None
    output = norm(torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1))
    assert output.flatten().tolist() == pytest.approx([-1, 1], abs=1e-5)


def test_convolution_applies_norm_then_activation():
    conv = Conv2d(1, 2, 1, bias=False, norm=frozen_with_statistics(), activation=torch.relu)
    nn.init.ones_(conv.weight)
    # Before the activation: (1 - 4) / 2 * 2 + 1 = -2 and 1 / 3 * 3 - 1 = 0.
    assert conv(torch.ones(1, 1, 1, 1)).flatten().tolist() == pytest.approx([0, 0], abs=1e-6)
    assert "norm.running_var" in conv.state_dict()


def test_block_freezes_parameters_and_norms():
    class Block(CNNBlockBase):
        def __init__(self):
            super().__init__(3, 4, stride=2)
            self.conv = Conv2d(3, 4, 1, norm=nn.BatchNorm2d(4))

    block = Block()
    assert block.freeze() is block
    assert (block.in_channels, block.out_channels, block.stride) == (3, 4, 2)
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert isinstance(block.conv.norm, FrozenBatchNorm2d)


def test_shape_spec_compares_by_value():
    assert ShapeSpec(channels=3, stride=4) == ShapeSpec(3, None, None, 4)
    assert ShapeSpec.__module__ == "detectron2.layers.shape_spec"  # saved configs name it


def test_cat_does_not_copy_a_single_tensor():
    single = torch.ones(2, 3)
    assert cat([single]) is single
    assert cat([single, single], dim=1).shape == (2, 6)
