"""The reader of DAT's fixtures on sizes and options that the stored fixtures do not have.

The published network is written a second time in plain loops; what that gives with random weights
must come out of the package's own parts, which the reader builds from the config alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from efficient_detr.checkpoint.backbones import convert_backbone
from efficient_detr.errors import UserError
from tests.golden_families import compare, dat_writer
from tests.golden_families.fixture import Comparison, Fixture

CONFIGS = Path(__file__).parents[1] / "configs" / "backbones"

COMMON: dict[str, Any] = {
    **dict(patch_size=4, num_classes=5, drop_path_rate=0.2, expansion=4),
    **dict(dwc_pes=[False] * 4, no_offs=[False] * 4, fixed_pes=[False] * 4, log_cpb=[False] * 4),
}
DAT: dict[str, Any] = {
    **COMMON,
    **dict(img_size=96, dim_stem=4, dims=[4, 8, 16, 32], depths=[2, 1, 2, 1]),
    **dict(stage_spec=[["L", "S"], ["L"], ["S", "D"], ["D"]], heads=[1, 2, 4, 4]),
    **dict(window_sizes=[3] * 4, groups=[-1, -1, 2, 4], use_pes=[False, False, True, True]),
    **dict(strides=[-1, -1, 1, 1], offset_range_factor=[-1, -1, 2, 2]),
    **dict(use_dwc_mlps=[False] * 4, use_conv_patches=False),
}
DAT_PLUS_PLUS: dict[str, Any] = {
    **COMMON,
    **dict(img_size=64, dim_stem=4, dims=[4, 8, 16, 32], depths=[2, 1, 2, 1]),
    **dict(stage_spec=[["N", "D"], ["D"], ["N", "D"], ["D"]], heads=[1, 2, 4, 4]),
    **dict(window_sizes=[7] * 4, groups=[1, 1, 2, 4], use_pes=[True] * 4, strides=[8, 4, 2, 1]),
    **dict(offset_range_factor=[-1] * 4, use_dwc_mlps=[True] * 4, use_lpus=[True] * 4),
    **dict(use_conv_patches=True, ksizes=[9, 7, 5, 3], nat_ksizes=[7] * 4),
}
NATIVE, OTHER = (96, 96), (60, 84)

# family, changes of the config, sizes, changes for the last run
SETTINGS: dict[str, tuple[str, dict[str, Any], list[tuple[int, int]], dict[str, Any] | None]] = {
    "resized": ("dat", {}, [NATIVE, (256, 256)], dict(img_size=256, window_sizes=[8] * 4)),
    "overlapping": ("dat", dict(use_conv_patches=True, dim_stem=6), [NATIVE], None),
    "convolved": ("dat", dict(use_dwc_mlps=[True, False, True, True]), [NATIVE], None),
    "strided": (
        "dat",
        dict(strides=[-1, -1, 2, 1], offset_range_factor=[-1, -1, 3, 0], groups=[-1, -1, 1, 2]),
        [NATIVE],
        None,
    ),
    "free": (
        "dat",
        dict(
            stage_spec=[["D", "L"], ["D"], ["D", "S"], ["L"]],
            **dict(groups=[1, 2, 4, -1], strides=[2, 3, 2, -1]),
            **dict(offset_range_factor=[0, -1, 0.5, -1], dwc_pes=[True, False, False, False]),
            use_pes=[True, False, True, False],
        ),
        [NATIVE],
        None,
    ),
    "detection": ("dat_detection", dict(window_sizes=[5, 4, 3, 2]), [NATIVE, OTHER], None),
    "detection_overlapping": (
        "dat_detection",
        dict(use_conv_patches=True, use_dwc_mlps=[True] * 4, strides=[-1, -1, 2, 2]),
        [OTHER],
        None,
    ),
    "bounded": ("dat_pp", dict(offset_range_factor=[-1, 2, 0, -1]), [(64, 64), (72, 104)], None),
    "kernels": (
        "dat_pp",
        dict(ksizes=[8, 5, 3, 3], nat_ksizes=[3, 5, 5, 3], dim_stem=6, dims=[8, 16, 32, 64]),
        [(96, 64)],
        None,
    ),
    "positions": (
        "dat_pp",
        dict(
            **dict(log_cpb=[True, False, False, False], dwc_pes=[False, True, False, False]),
            **dict(fixed_pes=[False, False, False, True], no_offs=[False, False, True, False]),
        ),
        [(64, 64)],
        None,
    ),
    "without_convolutions": (
        "dat_pp",
        dict(
            use_conv_patches=False,
            **dict(use_dwc_mlps=[False] * 4, use_lpus=[False, True, False, False]),
            layer_scale_values=[-1, 1e-5, -1, 1e-5],
        ),
        [(64, 96)],
        None,
    ),
    "windows": (
        "dat_pp",
        dict(stage_spec=[["L", "S"], ["N"], ["S", "D"], ["D"]], window_sizes=[4] * 4),
        [(64, 64), (80, 80)],
        None,
    ),
}


def fixture_of(setting: str) -> Fixture:
    family, changes, sizes, resized = SETTINGS[setting]
    config = (DAT_PLUS_PLUS if family == "dat_pp" else DAT) | changes
    return dat_writer.write(family, config, sizes, resized)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_package_gives_what_plain_loops_give(setting: str) -> None:
    fixture = fixture_of(setting)
    compare(Comparison(fixture))
    sizes = SETTINGS[setting][2]
    runs = [str(run) for run in range(1, len(sizes) + 1)]
    assert all({f"r{run}.logits", f"r{run}.stage3"} <= fixture.tensors.keys() for run in runs)
    assert any(name.endswith(".pos") for name in fixture.tensors)
    assert (SETTINGS[setting][3] is not None) == any(name[:2] == "w2" for name in fixture.tensors)


ATTENTION: dict[str, dict[str, Any]] = {
    "free": dict(code=2022, offset_range_factor=0),
    "strided": dict(code=2022, offset_range_factor=3, stride=2, n_groups=4, stage_idx=1),
    "squashed": dict(code=2022, offset_range_factor=-2, n_heads=6, stride=3, stage_idx=0),
    "convolved": dict(code=2022, dwc_pe=True, n_groups=1),
    "unmoved": dict(code=2023, offset_range_factor=0, q_size=[5, 5], ksize=5),
    "clamped": dict(code=2023, offset_range_factor=-1, stride=2, ksize=2, n_groups=1),
    "network": dict(code=2023, offset_range_factor=3, stride=2, ksize=5, log_cpb=True),
    "queries": dict(code=2023, dwc_pe=True, stride=2, ksize=7, n_groups=4, n_head_channels=3),
    "fixed": dict(code=2023, fixed_pe=True, q_size=[8, 8], kv_size=[8, 8], stride=2),
    "pooled": dict(code=2023, no_off=True, stride=2, ksize=2),
    "pooled_bounded": dict(code=2023, no_off=True, offset_range_factor=-1, stride=4, ksize=3),
    "without": dict(code=2023, use_pe=False, dwc_pe=True),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_by_itself(case: str) -> None:
    """Forward and backward, with the options of one case."""
    size = (8, 8) if case == "fixed" else (8, 12)
    if ATTENTION[case]["code"] == 2023 and case not in ("fixed", "pooled", "pooled_bounded"):
        size = (9, 7)
    fixture = dat_writer.write_attention({case: ATTENTION[case]}, size)
    compare(Comparison(fixture))
    gradients = {name for name in fixture.tensors if name.startswith(f"{case}.grad.")}
    assert f"{case}.grad.x" in gradients
    assert any("conv_offset" in name for name in gradients) != ATTENTION[case].get("no_off", False)


@pytest.mark.parametrize("part", ["y", "offset_raw", "pos", "ref", "grad.x", "grad.proj_k.weight"])
def test_a_wrong_number_of_attention_fails(part: str) -> None:
    fixture = dat_writer.write_attention({"strided": ATTENTION["strided"]}, (6, 6))
    name = f"strided.{part}"
    tensors = fixture.tensors | {name: fixture.tensors[name] * 1.1}
    with pytest.raises(AssertionError, match=name):
        compare(Comparison(dataclasses.replace(fixture, tensors=tensors)))


def test_a_gradient_too_many_or_too_few_fails() -> None:
    fixture = dat_writer.write_attention({"pooled": ATTENTION["pooled"]}, (8, 8))
    more = fixture.tensors | {"pooled.grad.conv_offset.0.bias": torch.zeros(8)}
    fewer = {
        key: value for key, value in fixture.tensors.items() if key != "pooled.grad.proj_q.bias"
    }
    for tensors in (more, fewer):
        with pytest.raises((AssertionError, KeyError)):
            compare(Comparison(dataclasses.replace(fixture, tensors=tensors)))


# The published configs of two variants, whose tables are for 224 x 224 pixels.
PUBLISHED: dict[str, dict[str, Any]] = {
    "dat_tiny": {
        **COMMON,
        **dict(num_classes=1000, img_size=224, dim_stem=96, dims=[96, 192, 384, 768]),
        **dict(depths=[2, 2, 6, 2], heads=[3, 6, 12, 24], groups=[-1, -1, 3, 6]),
        **dict(stage_spec=[["L", "S"], ["L", "S"], ["L", "D"] * 3, ["L", "D"]]),
        **dict(window_sizes=[7] * 4, use_pes=[False, False, True, True]),
        **dict(strides=[-1, -1, 1, 1], offset_range_factor=[-1, -1, 2, 2]),
        **dict(use_dwc_mlps=[False] * 4, use_conv_patches=False),
    },
    "dat_plus_plus_tiny": {
        **COMMON,
        **dict(num_classes=1000, img_size=224, dim_stem=64, dims=[64, 128, 256, 512]),
        **dict(depths=[2, 4, 18, 2], heads=[2, 4, 8, 16], groups=[1, 2, 4, 8]),
        **dict(stage_spec=[["N", "D"], ["N", "D"] * 2, ["N", "D"] * 9, ["D", "D"]]),
        **dict(window_sizes=[7] * 4, use_pes=[True] * 4, strides=[8, 4, 2, 1]),
        **dict(offset_range_factor=[-1] * 4, use_dwc_mlps=[True] * 4, use_lpus=[True] * 4),
        **dict(use_conv_patches=True, ksizes=[9, 7, 5, 3], nat_ksizes=[7] * 4),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configs_are_the_published_networks(name: str) -> None:
    """The variants' own tables, with weights under all the names of a published checkpoint."""
    weights: dict[str, Any] = {}
    network = dat_writer.PublishedDAT(
        PUBLISHED[name], 2022 if name == "dat_tiny" else 2023, weights
    )
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        network.run(images)
        model = instantiate(LazyConfig.load(str(CONFIGS / f"{name}.py")).model)
        converted = convert_backbone(weights, model)
        assert converted is not None and not converted.report.initial
        assert not converted.report.resized
        model.load_state_dict(converted.state)
        logits = model.eval().classify(images)
    torch.testing.assert_close(logits, network.seen["logits"], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def overlapping() -> Fixture:
    torch.manual_seed(0)
    return fixture_of("overlapping")


@pytest.mark.parametrize(
    "name",
    [
        *("r1.patch_proj", "r1.down1", "r1.stage2", "r1.stage0.block1.attn_out", "r1.cls_norm"),
        *("r1.stage2.block1.offset_raw", "r1.stage3.block0.pos", "r1.stage3.block0.ref"),
        *("r1.logits", "w.stages.1.attns.0.relative_position_bias_table"),
    ],
)
def test_a_wrong_number_fails(overlapping: Fixture, name: str) -> None:
    tensors = overlapping.tensors | {name: overlapping.tensors[name] + 0.01}
    if name[0] == "w":  # the same number added to all biases would change nothing
        tensors[name] = overlapping.tensors[name].flip(0)
    with pytest.raises(AssertionError, match=r"r1\."):
        compare(Comparison(dataclasses.replace(overlapping, tensors=tensors)))


@pytest.mark.parametrize("name", ["w.stages.0.mlps.0.extra", "r1.stage3.block0.rank"])
def test_an_unknown_tensor_fails(overlapping: Fixture, name: str) -> None:
    tensors = overlapping.tensors | {name: torch.zeros(1)}
    with pytest.raises((AssertionError, UserError)):
        compare(Comparison(dataclasses.replace(overlapping, tensors=tensors)))


def test_a_missing_weight_fails(overlapping: Fixture) -> None:
    tensors = {
        name: tensor
        for name, tensor in overlapping.tensors.items()
        if name != "w.stages.0.proj.weight"
    }
    with pytest.raises(UserError, match="no weights for .*projection"):
        compare(Comparison(dataclasses.replace(overlapping, tensors=tensors)))


@pytest.mark.parametrize(
    "change",
    [
        {"stage_spec": [["L", "L"], ["L"], ["S", "D"], ["D"]]},
        {"offset_range_factor": [-1, -1, 2, 1]},
        {"heads": [1, 2, 4, 8]},
        {"groups": [-1, -1, 2, 2], "dims": [4, 8, 16, 32]},
    ],
)
def test_settings_of_the_json_are_used(overlapping: Fixture, change: dict[str, Any]) -> None:
    info = overlapping.info | {"config": overlapping.info["config"] | change}
    with pytest.raises((AssertionError, UserError)):
        compare(Comparison(dataclasses.replace(overlapping, info=info)))


def test_unknown_attention(overlapping: Fixture) -> None:
    change = {"stage_spec": [["L", "E"], ["L"], ["S", "D"], ["D"]]}
    info = overlapping.info | {"config": overlapping.info["config"] | change}
    with pytest.raises(ValueError, match="unknown attention 'E'"):
        compare(Comparison(dataclasses.replace(overlapping, info=info)))
