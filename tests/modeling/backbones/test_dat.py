"""DAT as a Detectron2 backbone: outputs, sizes, frozen parts, drop path, checkpointing, padding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import Backbone
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.dat import DAT, DATBlock, DATStage
from efficient_detr.modeling.backbones.dat_stems import PatchMerging, PatchStem
from efficient_detr.modeling.backbones.dat_variants import StageSpecification, dat, dat_plus_plus
from efficient_detr.modeling.backbones.map_attention import MapAttention
from efficient_detr.modeling.backbones.map_layers import MapFeedForward

CONFIGS = Path(__file__).parents[3] / "configs"
ALL = ["p0", "p1", "p2", "p3"]
CHANNELS = dict(p0=8, p1=16, p2=32, p3=64)
STRIDES = dict(p0=4, p1=8, p2=16, p3=32)

Make = Callable[..., DAT]


def dat_2022(**options: Any) -> DAT:
    """A narrow DAT with all attentions of 2022."""
    stages = [
        StageSpecification("LS", 8, 2),
        StageSpecification("LD", 16, 4, num_groups=2, key_stride=4, offset_kernel=7),
        StageSpecification("LD", 32, 4, num_groups=4, key_stride=2, offset_kernel=5),
        StageSpecification("LD", 64, 8, num_groups=2),
    ]
    torch.manual_seed(0)
    backbone: DAT = instantiate(dat(stages, image_size=96, window=3, **options))
    return backbone


def dat_2023(**options: Any) -> DAT:
    """A narrow DAT++."""
    stages = [
        StageSpecification("ND", 8, 2, num_groups=1, key_stride=8, offset_kernel=9),
        StageSpecification("ND", 16, 4, num_groups=2, key_stride=4, offset_kernel=7),
        StageSpecification("ND", 32, 4, num_groups=2, key_stride=2, offset_kernel=5),
        StageSpecification("DD", 64, 8, num_groups=4),
    ]
    torch.manual_seed(0)
    backbone: DAT = instantiate(dat_plus_plus(stages, image_size=96, window=3, **options))
    return backbone


both = pytest.mark.parametrize("make", [dat_2022, dat_2023])


@both
def test_outputs_are_named_like_those_of_swin(make: Make) -> None:
    backbone = make(out_features=ALL)
    assert isinstance(backbone, Backbone)
    shapes = backbone.output_shape()
    assert {name: shape.channels for name, shape in shapes.items()} == CHANNELS
    assert {name: shape.stride for name, shape in shapes.items()} == STRIDES
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 64, 96))
    assert list(maps) == ALL
    for name, features in maps.items():
        stride = STRIDES[name]
        assert features.shape == (2, CHANNELS[name], 64 // stride, 96 // stride)


@both
def test_only_the_wanted_outputs_in_the_order_of_the_stages(make: Make) -> None:
    backbone = make(out_features=["p3", "p1"])
    assert list(backbone.output_shape()) == ["p1", "p3"]
    assert list(backbone.output_norms) == ["p1", "p3"]
    full = make(out_features=ALL)
    full.load_state_dict(backbone.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, all_maps = backbone.eval()(images), full.eval()(images)
    assert list(maps) == ["p1", "p3"]
    for name, features in maps.items():
        torch.testing.assert_close(features, all_maps[name])


@both
def test_stages_after_the_last_output_neither_run_nor_learn(make: Make) -> None:
    """Data-parallel training wants a gradient for every parameter that it should train."""
    backbone = make(out_features=["p0", "p1"])
    ran: list[nn.Module] = []
    for stage in backbone.stages:
        stage.register_forward_pre_hook(lambda module, args: ran.append(module))
    outputs = backbone(torch.randn(1, 3, 64, 64))
    assert ran == list(backbone.stages[:2])
    sum(features.sum() for features in outputs.values()).backward()
    for name, parameter in backbone.named_parameters():
        used = not name.startswith(("stages.2.", "stages.3."))
        assert parameter.requires_grad == used
        assert (parameter.grad is not None) == used
    # Their weights are part of a checkpoint all the same.
    full = make(out_features=["p0", "p1", "p3"])
    assert not full.load_state_dict(backbone.state_dict(), strict=False).unexpected_keys


@both
def test_an_empty_batch_is_a_sentence(make: Make) -> None:
    with pytest.raises(ValueError, match="a batch of no images"):
        make()(torch.zeros(0, 3, 64, 64))


@both
@torch.no_grad()
def test_the_norm_of_an_output_changes_no_later_stage(make: Make) -> None:
    backbone = make(out_features=ALL).eval()
    images = torch.randn(1, 3, 64, 64)
    before = backbone(images)
    norm: Any = backbone.output_norms["p1"]
    norm.weight.fill_(2.0)
    norm.bias.fill_(1.0)
    after = backbone(images)
    torch.testing.assert_close(after["p1"], 2 * before["p1"] + 1)
    for name in ("p0", "p2", "p3"):
        torch.testing.assert_close(after[name], before[name])
    # Scale 1 and shift 0: each cell has mean 0 and variance 1.
    torch.testing.assert_close(before["p3"].mean(1), torch.zeros(1, 2, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        before["p3"].var(1, correction=0), torch.ones(1, 2, 2), rtol=0, atol=1e-2
    )


@both
def test_images_should_be_padded_to_multiples_of_32(make: Make) -> None:
    assert make().size_divisibility == 32


# --- frozen parts


def expected_frozen(freeze_at: int, name: str) -> bool:
    """By the name of a parameter, as the docstring says it: stem, then stage by stage."""
    parts = name.split(".")
    if parts[0] == "output_norms":
        return int(parts[1][1]) + 2 <= freeze_at
    stage, is_stem = int(parts[1]), parts[1:3] == ["0", "merging"]
    return freeze_at >= 1 if is_stem else stage + 2 <= freeze_at


@both
@pytest.mark.parametrize("freeze_at", range(6))
def test_frozen_parameters(make: Make, freeze_at: int) -> None:
    backbone = make(freeze_at=freeze_at, out_features=ALL)
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != expected_frozen(freeze_at, name), name
    trained = sum(parameter.requires_grad for parameter in backbone.parameters())
    assert (trained == 0) == (freeze_at == 5)


@both
def test_frozen_parts_stay_in_evaluation(make: Make) -> None:
    """Drop path would otherwise make frozen features random."""
    backbone: Any = make(freeze_at=3, drop_path_rate=0.5, out_features=ALL)
    backbone.train()
    for stage in backbone.stages[:2]:
        assert not any(module.training for module in stage.modules())
    for stage in backbone.stages[2:]:
        assert all(module.training for module in stage.modules())
    assert not backbone.output_norms["p1"].training
    assert backbone.output_norms["p2"].training
    assert backbone.training
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(images)["p1"], backbone(images)["p1"])
    backbone.eval()
    assert not any(module.training for module in backbone.modules())


@both
def test_gradients_reach_what_is_not_frozen(make: Make) -> None:
    backbone = make(freeze_at=2, out_features=ALL)
    images = torch.randn(1, 3, 96, 96)
    sum(features.square().mean() for features in backbone(images).values()).backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("freeze_at", [-1, 6])
def test_a_stage_that_cannot_be_frozen(freeze_at: int) -> None:
    with pytest.raises(ConfigError, match=f"freeze_at={freeze_at}: choose 0 to 5"):
        dat_2022(freeze_at=freeze_at)


@pytest.mark.parametrize("names", [["p4"], [], ["p1", "p1"], ["res3"]])
def test_outputs_that_are_none(names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"out_features=.*p0, p1, p2, p3, each once"):
        dat_2022(out_features=names)


# --- drop path and gradient checkpointing


@both
def test_drop_path_rates(make: Make) -> None:
    """From 0 in the first of eight blocks to the given rate in the last."""
    backbone: Any = make(drop_path_rate=0.35)
    rates = [block.drop_path.probability for stage in backbone.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35])


class Ones(MapAttention):
    """An attention that gives ones."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.ones_like(features)


def test_both_branches_of_a_block_are_dropped_and_scaled() -> None:
    """Keeping probability 1/2: of two branches that give 1, each adds 0 or 2 to an image."""
    feedforward = MapFeedForward(channels=4, hidden_channels=4)
    with torch.no_grad():
        feedforward.contract.weight.zero_()
        feedforward.contract.bias.fill_(1.0)
    block = DATBlock(attention=Ones(), feedforward=feedforward, channels=4, drop_path=0.5)
    torch.manual_seed(0)
    added = block(torch.zeros(200, 2, 2, 4)).flatten(1)
    assert (added == added[:, :1]).all()
    assert added.unique().tolist() == [0.0, 2.0, 4.0]
    assert added[:, 0].mean().item() == pytest.approx(2.0, abs=0.4)
    assert (block.eval()(torch.zeros(3, 2, 2, 4)) == 2.0).all()


def test_layer_scale_weighs_the_branches() -> None:
    feedforward = MapFeedForward(channels=4, hidden_channels=4)
    with torch.no_grad():
        feedforward.contract.weight.zero_()
        feedforward.contract.bias.fill_(1.0)
    block = DATBlock(attention=Ones(), feedforward=feedforward, channels=4, layer_scale=0.25)
    torch.testing.assert_close(block(torch.zeros(1, 2, 2, 4)), torch.full((1, 2, 2, 4), 0.5))
    assert {"attention_scale.weight", "feedforward_scale.weight"} <= set(block.state_dict())
    with torch.no_grad():
        block.get_parameter("attention_scale.weight").fill_(3.0)
    torch.testing.assert_close(block(torch.zeros(1, 2, 2, 4)), torch.full((1, 2, 2, 4), 3.25))


@both
def test_gradient_checkpointing_gives_the_same_gradients(make: Make) -> None:
    """With random drops, too: the second pass drops what the first dropped."""
    images = torch.randn(2, 3, 64, 64)
    gradients, calls = [], []
    for checkpointing in (False, True):
        backbone: Any = make(drop_path_rate=0.5, gradient_checkpointing=checkpointing)
        count = [0]
        backbone.stages[1].blocks[0].attention.register_forward_hook(
            functools.partial(count_call, count)
        )
        torch.manual_seed(1)
        sum(features.square().mean() for features in backbone(images).values()).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
        calls.append(count[0])
    assert calls == [1, 2], "checkpointing computes each block twice"
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def count_call(count: list[int], module: nn.Module, inputs: Any, output: Any) -> None:
    count[0] += 1


# --- sizes


@both
@torch.no_grad()
@pytest.mark.parametrize("size", [(61, 75), (32, 33), (100, 130)])
def test_sizes_that_are_no_multiples(make: Make, size: tuple[int, int]) -> None:
    """Called directly: the patches of 2022 drop the rest, the convolutions of 2023 keep it."""
    rounding = math.floor if make is dat_2022 else math.ceil
    maps = make(out_features=ALL).eval()(torch.randn(1, 3, *size))
    sides = [(rounding(size[0] / 4), rounding(size[1] / 4))]
    for _ in range(3):
        sides.append((rounding(sides[-1][0] / 2), rounding(sides[-1][1] / 2)))
    assert [tuple(features.shape[2:]) for features in maps.values()] == sides


def detector(make: Make) -> Any:
    """The quickstart with another backbone."""
    config = LazyConfig.load(str(CONFIGS / "quickstart.py"))
    config.model.detector.neck.in_channels = [16, 32, 64]
    config.model.detector.neck.in_features = ["p1", "p2", "p3"]
    config.model.detector.backbone = {"_target_": make}
    torch.manual_seed(0)
    return instantiate(config.model).eval()


def record(seen: list[Any], module: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
    seen.append((inputs[0], output))


@both
@torch.no_grad()
@pytest.mark.parametrize("size", [(427, 640), (61, 75)])
def test_a_detector_pads_so_that_no_pixel_is_dropped(make: Make, size: tuple[int, int]) -> None:
    """427x640 becomes 448x640 and 61x75 becomes 64x96: all maps hold whole cells."""
    model = detector(make)
    seen: list[Any] = []
    model.detector.backbone.register_forward_hook(functools.partial(record, seen))
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    (result,) = model([{"image": image, "height": size[0], "width": size[1]}])
    assert result["instances"].image_size == size
    ((images, maps),) = seen
    canvas = [32 * math.ceil(side / 32) for side in size]
    assert list(images.shape[2:]) == canvas
    for name, features in maps.items():
        assert list(features.shape[2:]) == [side // STRIDES[name] for side in canvas]
        assert features.isfinite().all()


@both
@torch.no_grad()
def test_a_batch_of_padded_images(make: Make) -> None:
    """An image gives what it gives on this canvas by itself, but not what it gives unpadded.

    Keys are spread over the whole canvas, so that padding moves them; it is no defect of a batch.
    """
    backbone = make(out_features=["p3"]).eval()
    small, large = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 96, 128)
    padded = nn.functional.pad(small, (0, 64, 0, 32))
    together = backbone(torch.cat([padded, large]))["p3"]
    torch.testing.assert_close(together[:1], backbone(padded)["p3"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1:], backbone(large)["p3"], rtol=1e-4, atol=1e-4)
    unpadded = backbone(small)["p3"]
    assert (together[:1, :, :2, :2] - unpadded).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (3, 3)])
def test_images_without_a_cell_in_the_last_stage(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="too small .* 32 pixels"):
        dat_2022()(torch.zeros(1, 3, *size))


@torch.no_grad()
def test_convolutions_take_the_smallest_images() -> None:
    maps = dat_2023(out_features=ALL).eval()(torch.randn(2, 3, 1, 5))
    assert [tuple(features.shape[2:]) for features in maps.values()] == [(1, 2), (1, 1), (1, 1)] + [
        (1, 1)
    ]
    assert all(features.isfinite().all() for features in maps.values())


# --- parts


def stage(channels: int, merging: nn.Module, in_channels: int | None = None) -> DATStage:
    block = DATBlock(
        attention=Ones(),
        feedforward=MapFeedForward(channels=channels, hidden_channels=channels),
        channels=channels,
    )
    return DATStage(blocks=[block], channels=channels, merging=merging, in_channels=in_channels)


def four_stages(stem_channels: int) -> list[DATStage]:
    return [
        stage(8, PatchStem(channels=stem_channels), in_channels=stem_channels),
        *(stage(2 * c, PatchMerging(in_channels=c, channels=2 * c)) for c in (8, 16, 32)),
    ]


def test_a_stem_of_another_width_is_projected() -> None:
    """Only then there is a layer for it."""
    torch.manual_seed(0)
    narrow = DAT(stages=four_stages(6))
    assert {name for name in narrow.state_dict() if "projection" in name} == {
        "stages.0.projection.weight",
        "stages.0.projection.bias",
    }
    assert not any("projection" in name for name in DAT(stages=four_stages(8)).state_dict())
    first: Any = narrow.stages[0]
    assert first.projection.weight.shape == (8, 6)
    images = torch.randn(1, 64, 64, 3)
    projected = nn.functional.linear(
        first.merging(images), first.projection.weight, first.projection.bias
    )
    torch.testing.assert_close(first(images), first.blocks[0](projected))
    assert narrow(torch.randn(1, 3, 64, 64))["p3"].shape == (1, 64, 2, 2)


def test_there_are_four_stages() -> None:
    with pytest.raises(ConfigError, match="four, but are 3"):
        DAT(stages=four_stages(8)[:3])


@both
def test_buffers_are_not_saved(make: Make) -> None:
    """Indices and masks can be computed: a checkpoint has parameters only."""
    backbone = make()
    assert set(backbone.state_dict()) == {name for name, _ in backbone.named_parameters()}


@both
@torch.no_grad()
def test_the_same_images_give_the_same_maps(make: Make) -> None:
    backbone, images = make().eval(), torch.randn(1, 3, 64, 96)
    for first, second in zip(backbone(images).values(), backbone(images).values(), strict=True):
        assert torch.equal(first, second)
