"""ResNet: names, shapes and freezing that configs and checkpoints rely on."""

from typing import Any

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    Backbone,
    ResNet,
    detector_postprocess,
)
from detectron2.modeling.backbone import BasicStem, BottleneckBlock
from detectron2.structures import Boxes, Instances


def resnet(depth=18, norm="FrozenBN", out_features=("res3", "res4", "res5"), **arguments):
    stages = ResNet.make_default_stages(depth, norm=norm)
    return ResNet(BasicStem(norm=norm), stages, out_features=list(out_features), **arguments)


@pytest.fixture(scope="module")
def resnet50():
    return resnet(50, norm="BN").eval()


def test_features_of_resnet50(resnet50):
    shapes = resnet50.output_shape()
    assert shapes == {
        "res3": ShapeSpec(channels=512, stride=8),
        "res4": ShapeSpec(channels=1024, stride=16),
        "res5": ShapeSpec(channels=2048, stride=32),
    }
    with torch.no_grad():
        features = resnet50(torch.randn(2, 3, 64, 96))
    for name, shape in shapes.items():
        assert features[name].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)


def test_number_of_parameters(resnet50):
    # torchvision's ResNet-50 has 25,557,032 parameters, of which 2048 * 1000 + 1000 are its
    # classifier.
    assert sum(parameter.numel() for parameter in resnet50.parameters()) == 25_557_032 - 2_049_000


def test_names_of_parameters(resnet50):
    names = set(resnet50.state_dict())
    assert {"stem.conv1.weight", "stem.conv1.norm.running_var"} <= names
    assert {"res2.0.shortcut.weight", "res2.2.conv3.norm.bias", "res5.2.conv2.weight"} <= names
    assert len([name for name in names if name.endswith("conv2.weight")]) == 3 + 4 + 6 + 3


def test_only_needed_stages_are_built():
    backbone = resnet(out_features=["stem", "res3"])
    assert not hasattr(backbone, "res4")
    assert list(backbone(torch.randn(1, 3, 32, 32))) == ["stem", "res3"]
    with pytest.raises(AssertionError):
        resnet(out_features=["res9"])


def test_freezing():
    backbone = resnet(norm="BN", freeze_at=2)
    trainable = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {"res3", "res4", "res5"}
    assert isinstance(backbone.stem.conv1.norm, FrozenBatchNorm2d)
    assert isinstance(backbone.res3[0].conv1.norm, torch.nn.BatchNorm2d)


def test_where_the_stride_sits():
    block = BottleneckBlock(8, 16, bottleneck_channels=4, stride=2, norm="")
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))
    block = BottleneckBlock(8, 16, bottleneck_channels=4, stride=2, norm="", stride_in_1x1=True)
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))


def test_arguments_of_each_block():
    arguments: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 16,
        "bottleneck_channels": 4,
        "norm": "",
    }
    blocks: list[Any] = ResNet.make_stage(
        BottleneckBlock, 3, stride_per_block=[2, 1, 1], dilation_per_block=[1, 2, 4], **arguments
    )
    assert [block.stride for block in blocks] == [2, 1, 1]
    assert [block.conv2.padding[0] for block in blocks] == [1, 2, 4]
    assert [block.shortcut is None for block in blocks] == [False, True, True]
    with pytest.raises(AssertionError):
        ResNet.make_stage(BottleneckBlock, 3, stride_per_block=[2, 1], **arguments)


def test_initial_weights_depend_on_the_seed_only():
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(resnet().res2[0].conv1.weight)
    assert torch.equal(*weights)
    # He initialisation over the fan-out: variance 2 / (64 * 3 * 3).
    assert weights[0].var().item() == pytest.approx(2 / 576, rel=0.05)


def test_custom_backbones_and_registries():
    class Tiny(Backbone):
        def __init__(self):
            super().__init__()
            self._out_features = ["p"]
            self._out_feature_channels = {"p": 3}
            self._out_feature_strides = {"p": 1}

        def forward(self, images):
            return {"p": images}

    assert Tiny().output_shape() == {"p": ShapeSpec(channels=3, stride=1)}
    assert Tiny().size_divisibility == 0
    assert Tiny().padding_constraints == {}
    with pytest.raises(TypeError):
        Backbone()  # type: ignore[abstract]
    for registry in (BACKBONE_REGISTRY, META_ARCH_REGISTRY):
        with pytest.raises(KeyError):
            registry.get("NoSuchModel")


def test_postprocessing_scales_clips_and_drops():
    # From (height 10, width 20) to (20, 60): x times 3, y times 2.
    found = Instances((10, 20), scores=torch.tensor([0.9, 0.8, 0.7]))
    found.pred_boxes = Boxes([[1, 1, 5, 4], [18, 8, 25, 12], [21, 1, 24, 4]])
    result = detector_postprocess(found, 20, 60)
    assert result.image_size == (20, 60)
    assert result.pred_boxes.tensor.tolist() == [[3, 2, 15, 8], [54, 16, 60, 20]]
    assert result.scores.tolist() == pytest.approx([0.9, 0.8])
