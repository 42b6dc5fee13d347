"""ResNets of ImageNet under torchvision's and Detectron2's names -> our models, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import Tensor, nn

from efficient_detr.checkpoint.backbone_layouts import LAYOUTS, find_prefix
from efficient_detr.checkpoint.backbones import convert_backbone, export_backbone
from efficient_detr.errors import UserError
from efficient_detr.modeling.classifier import ImageClassifier
from tests.building import without_storage
from tests.checkpoint.manifest_files import load_manifest, meta_state
from tests.checkpoint.test_backbones import below, converted, published_state

BACKBONES = Path(__file__).parents[2] / "configs" / "common" / "models" / "backbones.py"
COUNTER = "num_batches_tracked"
State = dict[str, Tensor]


def resnet(depth: int = 50, *outputs: str) -> Any:
    """The backbone of the detectors' configs, without storage; "dc5" for the dilated one."""
    if outputs == ("dc5",):
        return without_storage(LazyConfig.load(str(BACKBONES), "resnet_dc5")(depth))
    return without_storage(LazyConfig.load(str(BACKBONES), "resnet")(depth, outputs or ["res5"]))


def small_resnet(norm: str = "FrozenBN", blocks: int = 2) -> ResNet:
    """Four narrow stages with weights, some of them random."""
    stages: Any = []
    for stage in range(4):
        channels = 2 ** (stage + 4)
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                num_blocks=blocks if stage == 2 else 1,
                in_channels=channels // 2,
                out_channels=channels,
                bottleneck_channels=4,
                norm=norm,
            )
        )
    stem = BasicStem(in_channels=3, out_channels=8, norm=norm)
    return ResNet(stem, stages, out_features=["res5"])


def assert_filled(state: State, model: nn.Module) -> None:
    """Every weight and buffer has a tensor of its shape, and nothing else is there."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == expected


@pytest.mark.parametrize(
    ("depth", "path"), [(50, "detector.backbone"), (50, "backbone.bottom_up"), (101, "")]
)
def test_torchvision_fills_the_backbone(depth: int, path: str) -> None:
    model = below(path, resnet(depth, "res3", "res4", "res5"))
    published = meta_state(load_manifest(f"torchvision_resnet{depth}"))
    result = converted(published, model)
    assert_filled(result.state, model)
    report = result.report
    assert (report.layout, report.target) == ("torchvision's ResNet", path)
    assert not report.initial and not report.parts
    heads = [k for k, reason in report.dropped.items() if "classification head" in reason]
    assert sorted(heads) == ["fc.bias", "fc.weight"]
    others = report.dropped.keys() - set(heads)
    assert others == {key for key in published if key.endswith(COUNTER)}


def test_dilated_stages_have_the_same_weights() -> None:
    model = below("detector.backbone", resnet(50, "dc5"))
    assert_filled(converted(meta_state(load_manifest("torchvision_resnet50")), model).state, model)


@pytest.mark.parametrize("prefix", ["backbone.0.body.", "module.backbone.", "encoder.net."])
def test_backbone_of_a_detector_of_others(prefix: str) -> None:
    published = meta_state(load_manifest("torchvision_resnet50"))
    state = {f"{prefix}{key}": tensor for key, tensor in published.items() if key[:2] != "fc"}
    whole = state | {f"{prefix.partition('.')[0]}.x.queries": torch.zeros(2)}
    model = below("detector.backbone", resnet())
    result = converted(whole, model)
    assert_filled(result.state, model)
    assert len(result.report.parts) == 1


def test_stages_after_the_last_output_are_left_out() -> None:
    model = resnet(50, "res3", "res4")
    result = converted(meta_state(load_manifest("torchvision_resnet50")), model)
    assert_filled(result.state, model)
    left = {key for key, why in result.report.dropped.items() if why.startswith("stages after")}
    assert left and all(key.startswith("layer4.") for key in left)


def converted_by_detectron2(published: State) -> State:
    """The names that Detectron2's converter of torchvision's files gives."""
    found = {}
    for key, tensor in published.items():
        name = key if key.startswith("layer") else f"stem.{key}"
        for stage in (1, 2, 3, 4):
            name = name.replace(f"layer{stage}", f"res{stage + 1}")
            name = name.replace(f"bn{stage}", f"conv{stage}.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        found[name] = tensor
    return found


@pytest.mark.parametrize("depth", [50, 101])
def test_names_of_detectron2_fill_the_backbone(depth: int) -> None:
    state = converted_by_detectron2(meta_state(load_manifest(f"torchvision_resnet{depth}")))
    model = below("detector.backbone", resnet(depth))
    result = converted(state, model)
    assert_filled(result.state, model)
    assert {"stem.fc.weight", "stem.conv1.norm.num_batches_tracked"} < result.report.dropped.keys()


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_values_go_to_torchvision_and_back(norm: str) -> None:
    torch.manual_seed(0)
    model = below("detector.backbone", small_resnet(norm))
    state = {
        name: torch.rand(tensor.shape) if tensor.dtype == torch.float32 else torch.tensor(7)
        for name, tensor in model.state_dict().items()
    }
    published = export_backbone(
        state | {"detector.neck.weight": torch.zeros(1)}, "torchvision_resnet"
    )
    assert len(published) == len(state)
    assert torch.equal(published["bn1.bias"], state["detector.backbone.stem.conv1.norm.bias"])
    shortcut = state["detector.backbone.res3.0.shortcut.norm.running_var"]
    assert torch.equal(published["layer2.0.downsample.1.running_var"], shortcut)
    back = converted(published, model).state
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_published_weights_are_written_as_they_were() -> None:
    published = load_manifest("torchvision_resnet50").shapes
    pool = torch.rand(3_000_000)
    state = {
        key: pool[number : number + torch.Size(shape).numel()].view(shape)
        for number, (key, shape) in enumerate(published.items())
        if not key.endswith(COUNTER)
    }
    backbone = resnet()
    with torch.device("meta"):
        model = ImageClassifier(backbone=backbone, feature="res5", channels=2048, num_classes=1000)
    result = converted(state, model)
    assert_filled(result.state, model)
    written = export_backbone(result.state, "torchvision_resnet")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)


def test_the_wrong_depth_is_named() -> None:
    with pytest.raises(UserError) as error:
        convert_backbone(meta_state(load_manifest("torchvision_resnet101")), resnet(50), "w.pth")
    text = str(error.value)
    assert text.startswith("w.pth (torchvision's ResNet with 3-4-23-3 blocks of 256-512-1024-2048")
    assert "ResNet-101) does not fit the model: layer3.6." in text and "\n" not in text
    with pytest.raises(UserError, match=r"ResNet-50\) does not fit .* no weights for res4\.6\."):
        convert_backbone(meta_state(load_manifest("torchvision_resnet50")), resnet(101), "w.pth")


def test_both_sides_are_named() -> None:
    with pytest.raises(UserError, match=r"^w \(DAT .* dat_tiny\) is for a DAT, but m has none"):
        convert_backbone(published_state("dat_tiny"), resnet(), "w", "m")
    state = meta_state(load_manifest("torchvision_resnet50"))
    with pytest.raises(UserError, match=r"^w \(.* ResNet-50\) does not fit m: it has no weights"):
        convert_backbone(state, resnet(101), "w", "m")


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def test_sizes_of_no_published_model_are_told() -> None:
    text = LAYOUTS[-1].describe(shapes_of(small_resnet(blocks=3).state_dict()))
    assert text == "Detectron2's ResNet with 1-1-3-1 blocks of 16-32-64-128 channels"


def test_basic_blocks_are_told_from_bottlenecks() -> None:
    with torch.device("meta"):
        stages: Any = ResNet.make_default_stages(34, norm="FrozenBN")
        model = ResNet(BasicStem(norm="FrozenBN"), stages)
    published = export_backbone(model.state_dict(), "torchvision_resnet")
    text = LAYOUTS[-2].describe(shapes_of(published))
    assert text.endswith("3-4-6-3 blocks of 64-128-256-512 channels, ResNet-34")


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["stem.a", "res2.0.b"], ""),
        (["x.stem.a", "x.res2.0.b"], "x."),
        (["x.y.stem.a", "x.y.res2.7.b", "x.stem.a", "stem.res2.0.b"], "x.y."),
        (["x.stem.a", "x.res2.0.b", "stem.stem.a", "stem.res2.0.b"], "x."),
        (["mystem.a", "myres2.0.b"], None),
        (["x.stem.a", "y.res2.0.b"], None),
        (["stem.a"], None),
        ([], None),
    ],
)
def test_prefix_of_a_backbone(keys: list[str], prefix: str | None) -> None:
    assert find_prefix(("stem.a", "res2.{block}.b"), keys) == prefix
