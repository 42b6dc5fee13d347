"""The published variants of DAT: parameters, cost, tables as data, configs and the registry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.dat import DAT, FEATURES
from efficient_detr.modeling.backbones.dat_variants import (
    VARIANTS,
    StageSpecification,
    add_dat_config,
    dat,
    dat_backbone,
    dat_plus_plus,
)
from efficient_detr.modeling.backbones.deformable_attention import DeformableMapAttention
from efficient_detr.modeling.backbones.neighborhood_attention import NeighborhoodAttention
from efficient_detr.modeling.backbones.window_attention import WindowAttention

# Parameters of the official code (LeapLabTHU/DAT) without cls_norm and cls_head, which serve the
# classification alone. Published: 29, 50 and 88 M for DAT, 24, 53 and 94 M for DAT++ (with them).
OFFICIAL_PARAMETERS = {
    "dat_tiny": 27_548_602,
    "dat_small": 48_929_866,
    "dat_base": 86_854_584,
    "dat_base_384": 87_151_224,
    "dat_plus_plus_tiny": 23_448_852,
    "dat_plus_plus_small": 52_356_830,
    "dat_plus_plus_base": 92_663_592,
    "dat_plus_plus_base_384": 92_663_592,
}

# Multiply-adds of the official code at 800x1280 in 10^9 (fvcore), without norms of outputs.
OFFICIAL_GFLOPS = {
    "dat_tiny": 134.613,
    "dat_small": 301.95,
    "dat_base": 481.68,
    "dat_plus_plus_tiny": 124.740,
    "dat_plus_plus_small": 248.21,
    "dat_plus_plus_base": 412.42,
}

# Side of the maps that tables are made for, at strides 4 to 32 of 224 and of 384 pixels.
TABLES_224 = (56, 28, 14, 7)
TABLES_384 = (96, 48, 24, 12)

TINY_DAT = [
    StageSpecification("LS", 8, 2),
    StageSpecification("LD", 16, 4, num_groups=2, key_stride=2, offset_kernel=5),
    StageSpecification("SD", 32, 4, num_groups=4),
    StageSpecification("D", 64, 8, num_groups=2),
]
TINY_DAT_PLUS_PLUS = [
    StageSpecification("ND", 8, 2, num_groups=1, key_stride=8, offset_kernel=9),
    StageSpecification("N", 16, 4, num_groups=2),
    StageSpecification("DD", 32, 4, num_groups=2, key_stride=2),
    StageSpecification("D", 64, 8, num_groups=4),
]


def on_meta(node: Any) -> DAT:
    with torch.device("meta"):
        backbone: DAT = instantiate(node)
    return backbone


def number_of_parameters(backbone: DAT) -> int:
    return sum(parameter.numel() for parameter in backbone.parameters())


def test_the_list_of_variants() -> None:
    assert set(VARIANTS) == set(OFFICIAL_PARAMETERS)


@pytest.mark.parametrize("variant", OFFICIAL_PARAMETERS)
def test_parameters(variant: str) -> None:
    """As many as the official models, and scale and shift of each output's norm."""
    expected, last = OFFICIAL_PARAMETERS[variant], VARIANTS[variant].stages[-1].channels
    assert number_of_parameters(on_meta(dat_backbone(variant, out_features=["p3"]))) == (
        expected + 2 * last
    )
    # C + 2C + 4C + 8C channels in the four norms.
    all_outputs = on_meta(dat_backbone(variant, out_features=FEATURES))
    assert number_of_parameters(all_outputs) == expected + 2 * 15 * last // 8


def test_parameters_of_the_ablation_by_its_table() -> None:
    """`dat_p`, the step between the two: stages of DAT++-T with patches and plain networks.

    Its official code has 22,258,772 parameters without the classifier.
    """
    stages = VARIANTS["dat_plus_plus_tiny"].stages
    backbone = on_meta(dat(stages, out_features=["p3"]))
    assert number_of_parameters(backbone) == 22_258_772 + 2 * 512


def layer_norm_cost(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """fvcore counts 5 multiply-adds an element; this counter's unit is half a multiply-add."""
    return 2 * 5 * int(torch.Size(shape).numel())


def grid_sampler_cost(features: Any, grid: Any, *args: Any, **kwargs: Any) -> int:
    """fvcore counts 4 an element of the output: channels times points."""
    return 2 * 4 * features[0] * features[1] * grid[1] * grid[2]


def multiply_adds(backbone: DAT, height: int, width: int) -> float:
    """Of a forward pass by PyTorch's own counter, which needs shapes only.

    How neighbourhood attention is computed is left to its operator: here each of a map's cells
    costs two products with k * k cells.
    """
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten.native_layer_norm: layer_norm_cost,
            torch.ops.aten.grid_sampler_2d: grid_sampler_cost,
        },
    )
    with torch.no_grad(), counter:
        backbone(torch.empty(1, 3, height, width, device="meta"))
    counts, total = counter.get_flop_counts(), counter.get_total_flops() / 2
    for stage, stride in enumerate((4, 8, 16, 32)):
        for name, module in backbone.get_submodule(f"stages.{stage}").named_modules():
            if isinstance(module, NeighborhoodAttention):
                path = f"DAT.stages.{stage}.{name}"
                total -= (sum(counts[path].values()) - linear_layers(counts, path)) / 2
                channels = module.output.out_features
                total += 2 * (height // stride) * (width // stride) * channels * 7**2
    return total


def linear_layers(counts: Any, name: str) -> int:
    """What the projections inside an attention cost."""
    return sum(sum(counts[f"{name}.{layer}"].values()) for layer in ("projection", "output"))


@pytest.mark.parametrize("variant", OFFICIAL_GFLOPS)
def test_cost_at_detection_size(variant: str) -> None:
    """To the last digit of the official count, which is 0.005 %."""
    backbone = on_meta(dat_backbone(variant, out_features=["p3"])).eval()
    output_norm = 5 * 25 * 40 * VARIANTS[variant].stages[-1].channels
    found = (multiply_adds(backbone, 800, 1280) - output_norm) / 1e9
    assert found == pytest.approx(OFFICIAL_GFLOPS[variant], abs=0.006)


@pytest.mark.parametrize(
    ("variant", "sides", "window"),
    [
        ("dat_tiny", TABLES_224, 7),
        ("dat_base_384", TABLES_384, 12),
        ("dat_plus_plus_tiny", TABLES_224, 7),
        ("dat_plus_plus_base_384", TABLES_224, 7),
    ],
)
def test_tables_are_made_for_the_image_size(
    variant: str, sides: tuple[int, ...], window: int
) -> None:
    """The 384 model of 2022 has larger ones, that of 2023 samples those of 224."""
    backbone: Any = on_meta(dat_backbone(variant))
    for stage, side in zip(backbone.stages, sides, strict=True):
        for block in stage.blocks:
            if isinstance(block.attention, DeformableMapAttention):
                table = block.attention.get_parameter("position_bias.relative_position_bias_table")
                assert table.shape[1:] == (2 * side - 1, 2 * side - 1)
            elif isinstance(block.attention, WindowAttention):
                assert block.attention.window == window
            else:
                assert block.attention.kernel_size == window


@pytest.mark.parametrize(
    ("variant", "letters"),
    [
        ("dat_tiny", ["LS", "LS", "LDLDLD", "LD"]),
        ("dat_small", ["LS", "LS", "LD" * 9, "LD"]),
        ("dat_plus_plus_tiny", ["ND", "NDND", "ND" * 9, "DD"]),
    ],
)
def test_each_letter_is_a_kind_of_attention(variant: str, letters: list[str]) -> None:
    names = {
        "WindowAttention": "L",
        "ShiftedWindowAttention": "S",
        "NeighborhoodAttention": "N",
        "DeformableMapAttention": "D",
    }
    backbone: Any = on_meta(dat_backbone(variant))
    found = [
        "".join(names[type(block.attention).__name__] for block in stage.blocks)
        for stage in backbone.stages
    ]
    assert found == letters


@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_and_heads(variant: str) -> None:
    """32 channels a head, twice the channels in each stage, and whole groups of heads."""
    for before, stage in zip(VARIANTS[variant].stages, VARIANTS[variant].stages[1:], strict=False):
        assert stage.channels == 2 * before.channels
    for stage in VARIANTS[variant].stages:
        assert stage.channels == 32 * stage.num_heads
        assert stage.num_heads % stage.num_groups == 0


def test_drop_path_rises_evenly_to_the_rate_of_the_variant() -> None:
    backbone: Any = on_meta(dat_backbone("dat_tiny"))
    rates = [block.drop_path.probability for stage in backbone.stages for block in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.2, 12).tolist())
    own: Any = on_meta(dat_backbone("dat_tiny", drop_path_rate=0.0))
    assert all(block.drop_path.probability == 0 for stage in own.stages for block in stage.blocks)


def test_drop_path_of_a_single_block_a_stage() -> None:
    stages = [replace(stage, attention="D") for stage in TINY_DAT]
    backbone: Any = on_meta(dat(stages, drop_path_rate=0.3, image_size=64, window=3))
    rates = [stage.blocks[0].drop_path.probability for stage in backbone.stages]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "node",
    [
        dat(TINY_DAT, image_size=64, window=3, drop_path_rate=0.2, freeze_at=1),
        dat_plus_plus(TINY_DAT_PLUS_PLUS, image_size=64, window=3, out_features=["p0", "p3"]),
    ],
    ids=["dat", "dat_plus_plus"],
)
def test_a_config_survives_yaml(node: Any, tmp_path: Path) -> None:
    """What is read from the file makes the same model: names, shapes, and outputs."""
    path = tmp_path / "backbone.yaml"
    LazyConfig.save(OmegaConf.create({"backbone": node}), str(path))
    backbone = instantiate(node).eval()
    reloaded: Any = instantiate(LazyConfig.load(str(path)).backbone).eval()
    reloaded.load_state_dict(backbone.state_dict())
    assert reloaded.freeze_at == backbone.freeze_at
    images = torch.randn(1, 3, 64, 64)
    outputs = reloaded(images)
    for name, expected in backbone(images).items():
        torch.testing.assert_close(outputs[name], expected)


def old_config(variant: str) -> Any:
    dat_options = SimpleNamespace(VARIANT=variant, OUT_FEATURES=["p2", "p3"], DROP_PATH_RATE=0.1)
    return SimpleNamespace(
        MODEL=SimpleNamespace(DAT=dat_options, BACKBONE=SimpleNamespace(FREEZE_AT=2))
    )


def test_the_registry_builds_for_the_older_configs() -> None:
    build = BACKBONE_REGISTRY.get("build_dat_backbone")
    with torch.device("meta"):
        backbone = build(old_config("dat_tiny"), ShapeSpec(channels=3))
    assert isinstance(backbone, DAT)
    assert list(backbone.output_shape()) == ["p2", "p3"]
    assert backbone.freeze_at == 2
    last: Any = backbone.get_submodule("stages.3.blocks.1.drop_path")
    assert last.probability == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="images of 3 channels, but they have 4"):
        build(old_config("dat_tiny"), ShapeSpec(channels=4))


def test_add_dat_config() -> None:
    """Detectron2's `get_cfg()` has nodes that are made from a dict, as OmegaConf's are."""
    cfg = OmegaConf.create({"MODEL": {"BACKBONE": {"FREEZE_AT": 0}}})
    build = BACKBONE_REGISTRY.get("build_dat_backbone")
    with pytest.raises(ConfigError, match="call add_dat_config"):
        build(cfg, ShapeSpec(channels=3))
    add_dat_config(cfg)
    cfg.MODEL.DAT.VARIANT = "dat_plus_plus_tiny"
    with torch.device("meta"):
        backbone = build(cfg, ShapeSpec(channels=3))
    assert list(backbone.output_shape()) == ["p1", "p2", "p3"]
    assert backbone.output_shape()["p3"].channels == 512


def test_an_unknown_variant_is_a_sentence_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="'dat_huge' is no variant of DAT.*dat_plus_plus_base_384"
    ):
        dat_backbone("dat_huge")


def test_an_unknown_letter_is_a_sentence() -> None:
    stages = [*TINY_DAT[:3], replace(TINY_DAT[3], attention="LX")]
    with pytest.raises(ConfigError, match="'LX'.*L, S, N and D"):
        dat(stages)


@pytest.mark.parametrize("number", [3, 5])
def test_a_table_has_four_stages(number: int) -> None:
    with pytest.raises(ConfigError, match=f"four.*{number}"):
        dat((TINY_DAT * 2)[:number])


@pytest.mark.parametrize("variant", ["dat_tiny", "dat_plus_plus_tiny"])
def test_attention_of_a_variant_may_be_replaced(variant: str) -> None:
    """Parts are nodes of the config: another limit of offsets is one line."""
    node = dat_backbone(variant)
    keys = node.stages[3].blocks[1].attention["keys"]
    keys.limit = {"_target_": "efficient_detr.modeling.backbones.deformed_keys.UnboundedOffsets"}
    backbone: Any = on_meta(node)
    limit = backbone.stages[3].blocks[1].attention.keys.limit
    assert type(limit).__name__ == "UnboundedOffsets"
