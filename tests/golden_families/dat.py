"""Fixtures of whole DATs: the models of 2022 and 2023, and those of 2022 at other sizes.

Weights come under the official keys as `w.*`, inputs as `r1.x`, `r2.x` and so on; where a run has a
config of its own, its tables were resized. Stored maps are (B, C, H, W).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efficient_detr.checkpoint.backbones import ConvertedState, convert_backbone
from efficient_detr.checkpoint.conversion import read_keys
from efficient_detr.checkpoint.dat import dat_backbone
from efficient_detr.modeling.backbones.dat import DAT, FEATURES, DATBlock, DATStage
from efficient_detr.modeling.backbones.dat_stems import (
    ConvolutionalMerging,
    ConvolutionalStem,
    OverlappingPatchStem,
    PatchMerging,
    PatchStem,
)
from efficient_detr.modeling.backbones.deformable_attention import DeformableMapAttention
from efficient_detr.modeling.backbones.map_attention import MapAttention
from efficient_detr.modeling.backbones.map_layers import (
    DepthwiseConvolution,
    MapFeedForward,
    ResidualDepthwiseConvolution,
)
from efficient_detr.modeling.backbones.neighborhood_attention import NeighborhoodAttention
from efficient_detr.modeling.backbones.window_attention import (
    ShiftedWindowAttention,
    WindowAttention,
)
from efficient_detr.modeling.classifier import ImageClassifier
from tests.golden_families.dat_attention import (
    KERNELS,
    AttentionOptions,
    build_with_weights,
    compare_places,
    tolerances,
)
from tests.golden_families.fixture import Comparison, Reader
from tests.golden_families.recorder import Recorder

# Absolute and relative tolerance of offsets and points behind many layers.
PLACES = 4e-5

# The code that a family's numbers come from.
CODES = {"dat": 2022, "dat_detection": 2022, "dat_pp": 2023}


def stage_config(config: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The entries of one stage, of every list that has one for each."""
    stages = len(config["dims"])
    return {
        key: value[index]
        for key, value in config.items()
        if isinstance(value, list) and len(value) == stages
    }


def attention_options(config: Mapping[str, Any], index: int, code: int) -> AttentionOptions:
    """The deformable attention of a stage."""
    stage = stage_config(config, index)
    side = config["img_size"] // config["patch_size"] // 2**index
    key_side = side // abs(stage["strides"])  # -1 in stages without this attention
    return AttentionOptions(
        code=code,
        channels=stage["dims"],
        num_heads=stage["heads"],
        num_groups=stage["groups"],
        kernel_size=KERNELS[index] if code == 2022 else stage["ksizes"],
        stride=stage["strides"],
        range_factor=stage["offset_range_factor"],
        map_shape=(side, side),
        key_shape=(key_side, key_side),
        use_pe=stage["use_pes"],
        dwc_pe=stage.get("dwc_pes", False),
        fixed_pe=stage.get("fixed_pes", False),
        log_cpb=stage.get("log_cpb", False),
        no_off=stage.get("no_offs", False),
    )


def build_backbone(
    config: Mapping[str, Any], code: int, out_features: tuple[str, ...] = FEATURES
) -> DAT:
    """The backbone that the published code builds of its config."""
    assert config["patch_size"] == 4, "the stems have a stride of 4"
    dims = config["dims"]
    stages = []
    for index, channels in enumerate(dims):
        if index == 0:
            merging, width = build_stem(config, code), config["dim_stem"]
        else:
            # The published projection to other widths than twice those before cannot run.
            kind = ConvolutionalMerging if config["use_conv_patches"] else PatchMerging
            merging, width = kind(in_channels=dims[index - 1], channels=channels), channels
        blocks = [
            build_block(config, index, letter, code)
            for letter in config["stage_spec"][index][: config["depths"][index]]
        ]
        stages.append(
            DATStage(blocks=blocks, channels=channels, merging=merging, in_channels=width)
        )
    return DAT(stages=stages, out_features=out_features)


def build_stem(config: Mapping[str, Any], code: int) -> nn.Module:
    channels = config["dim_stem"]
    if not config["use_conv_patches"]:
        return PatchStem(channels=channels)
    if code == 2022:
        return OverlappingPatchStem(channels=channels)
    return ConvolutionalStem(channels=channels)


def build_block(config: Mapping[str, Any], index: int, letter: str, code: int) -> DATBlock:
    stage = stage_config(config, index)
    channels = stage["dims"]
    hidden = config["expansion"] * channels
    mixing = DepthwiseConvolution if code == 2022 else ResidualDepthwiseConvolution
    perceives = code == 2023 and stage.get("use_lpus", False)
    scale = stage.get("layer_scale_values", -1.0)
    return DATBlock(
        attention=build_attention(config, index, letter, code),
        feedforward=MapFeedForward(
            channels=channels,
            hidden_channels=hidden,
            mixing=mixing(channels=hidden) if stage["use_dwc_mlps"] else None,
        ),
        channels=channels,
        local_perception=ResidualDepthwiseConvolution(channels=channels) if perceives else None,
        layer_scale=scale if scale > 0 else None,
    )


def build_attention(config: Mapping[str, Any], index: int, letter: str, code: int) -> MapAttention:
    stage = stage_config(config, index)
    channels, heads = stage["dims"], stage["heads"]
    if letter == "L":
        return WindowAttention(channels=channels, num_heads=heads, window=stage["window_sizes"])
    if letter == "S":
        return ShiftedWindowAttention(
            channels=channels, num_heads=heads, window=stage["window_sizes"]
        )
    if letter == "N":
        return NeighborhoodAttention(
            channels=channels, num_heads=heads, kernel_size=stage["nat_ksizes"]
        )
    if letter == "D":
        return attention_options(config, index, code).build()
    raise ValueError(f"unknown attention {letter!r} of a golden fixture: know L, S, N, D")


def build_classifier(config: Mapping[str, Any], code: int) -> ImageClassifier:
    return ImageClassifier(
        backbone=build_backbone(config, code, FEATURES[-1:]),
        feature=FEATURES[-1],
        channels=config["dims"][-1],
        num_classes=config["num_classes"],
    )


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> ConvertedState:
    """Load published weights, which must fill the model."""
    converted = convert_backbone(weights, model)
    assert converted is not None, "these are no keys of a DAT"
    model.load_state_dict(converted.state)
    model.eval()
    return converted


def compare(comparison: Comparison) -> None:
    """Every run, and the tables that were resized for it."""
    fixture = comparison.fixture
    code = CODES[fixture.info["family"]]
    weights = {key: comparison.expect(f"w.{key}") for key in fixture.group("w.")}
    for _, (run,) in comparison.matches(r"r(\d+)\.x"):
        config = fixture.info.get(f"config_r{run}") or fixture.config
        model = build_classifier(config, code)
        compare_tables(comparison, f"w{run}.", load(model, weights), weights)
        compare_run(comparison, f"r{run}.", model, weights, config)
        if any(key.startswith("norms.") for key in weights):
            compare_detection(comparison, f"r{run}.", build_backbone(config, code), weights)


def compare_detection(
    comparison: Comparison, prefix: str, backbone: DAT, weights: Mapping[str, Tensor]
) -> None:
    """The maps that a detector gets, each with a norm of its own."""
    load(backbone, weights)
    with torch.no_grad():
        maps = backbone(comparison.expect(f"{prefix}x"))
    comparison.read(
        {re.escape(prefix) + r"det_out(\d+)": lambda stage: maps[FEATURES[stage]]},
        **tolerances(comparison.fixture.info["tolerance"]),
    )


def compare_tables(
    comparison: Comparison, prefix: str, converted: ConvertedState, weights: Mapping[str, Tensor]
) -> None:
    """Tables of positions whose size differs from that of the weights; there are no others."""
    tables = comparison.fixture.group(prefix)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    read = read_keys(tables, dat_backbone(shapes))
    assert not read.unknown
    names = {name: key for name, (key,) in read.sources.items()}
    for name, key in names.items():
        comparison.close(
            prefix + key,
            converted.state[f"backbone.{name}"],
            **tolerances(comparison.fixture.info["tolerance"]),
        )
    assert converted.report.resized.keys() <= {f"backbone.{name}" for name in names}


def compare_run(
    comparison: Comparison,
    prefix: str,
    model: ImageClassifier,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    """Run a model and compare all that happens inside."""
    recorder = Recorder(model)
    with torch.no_grad():
        logits = model.classify(comparison.expect(f"{prefix}x"))
    backbone = model.backbone
    assert isinstance(backbone, DAT)
    readers = stage_readers(backbone, recorder) | {"logits": lambda: logits}
    comparison.read(
        {re.escape(prefix) + pattern: reader for pattern, reader in readers.items()},
        **tolerances(comparison.fixture.info["tolerance"]),
    )
    code = CODES[comparison.fixture.info["family"]]
    stages: Any = backbone.stages
    for index, stage in enumerate(stages):
        options = attention_options(config, index, code)
        for number, block in enumerate(stage.blocks):
            attention = block.attention
            if isinstance(attention, DeformableMapAttention):
                inside = below(weights, f"stages.{index}.attns.{number}.")
                unused = build_with_weights(options, inside)[1] if options.no_off else None
                query = recorder.output(attention.query)
                part = f"{prefix}stage{index}.block{number}."
                compare_places(comparison, part, attention, unused, query, PLACES)


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights of a module by their names in it."""
    return {
        key.removeprefix(prefix): weight
        for key, weight in weights.items()
        if key.startswith(prefix)
    }


def stage_readers(backbone: DAT, recorder: Recorder) -> dict[str, Reader]:
    """Maps of the last run by their name in the fixtures."""

    def output(module: nn.Module) -> Tensor:
        return recorder.output(module).permute(0, 3, 1, 2)

    stages: Any = backbone.stages
    return {
        r"patch_proj": lambda: output(stages[0].merging),
        r"down(\d+)": lambda stage: output(stages[stage + 1].merging),
        r"stage(\d+)": lambda stage: output(stages[stage]),
        r"stage(\d+)\.block(\d+)\.attn_out": lambda stage, block: output(
            stages[stage].blocks[block].attention
        ),
        r"cls_norm": lambda: output(backbone.output_norms[FEATURES[-1]]),
    }
