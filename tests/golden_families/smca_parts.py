"""Fixtures of parts of SMCA-DETR: the convolutional encoder, and a decoder layer by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import instantiate
from torch import Tensor

from efficient_detr.checkpoint import convert_keys
from efficient_detr.checkpoint import smca as layouts
from efficient_detr.checkpoint.conversion import Row
from efficient_detr.structures import FeatureTokens
from tests.golden_families.fixture import Comparison, Fixture
from tests.golden_families.models import builder
from tests.golden_families.smca import LOGITS, SCALES, shares_convolutions

# Where a JSON does not say: the published model has as many pixels a cell.
STRIDE = 32


def our_state(weights: Mapping[str, Tensor], table: list[Row], part: str) -> dict[str, Tensor]:
    """Weights of a part of a model under our keys, without that of the part."""
    return {key.removeprefix(part): tensor for key, tensor in convert_keys(weights, table).items()}


def compare_conv_encoder(comparison: Comparison) -> None:
    """The layers of the convolutional encoder by themselves."""
    fixture = comparison.fixture
    config = fixture.config
    weights = {f"transformer.{key}": value for key, value in fixture.weights().items()}
    maps, positions = (stored_levels(fixture, name) for name in ("src", "pos"))
    model = builder("smca", "smca_conv")(
        backbone=None,
        channels=config["d_model"],
        hidden_channels=config["dim_feedforward"],
        encoder_layers=config["layers"],
        dropout=0.0,
        kernel_size=config["kernel"],
        shared=shares_convolutions(weights),
    )
    encoder = instantiate(model.detector.encoder).eval()
    state = our_state(weights, layouts.smca_conv(), "detector.encoder.")
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    # The fixture ends before the level is halved for the decoder.
    assert set(missing) == {"reduction.weight", "reduction.bias"} and not unexpected
    tokens = tokens_of_maps(maps, positions)
    strides = list(maps)
    for index, layer in enumerate(encoder.layers):
        tokens = tokens.with_features(layer(tokens))
        for level, stride in enumerate(strides):
            comparison.close(f"out/layer{index}.s{stride}", tokens.level(level), *LOGITS)


def stored_levels(fixture: Fixture, name: str) -> dict[int, Tensor]:
    """stride -> map (B, C, H_l, W_l), finest first."""
    stored = fixture.group(f"inputs/{name}.s")
    return {stride: stored[str(stride)] for stride in sorted(map(int, stored))}


def tokens_of_maps(maps: Mapping[int, Tensor], positions: Mapping[int, Tensor]) -> FeatureTokens:
    """Tokens of maps without padding."""
    features, located = (
        torch.cat([level.flatten(2).transpose(1, 2) for level in levels.values()], dim=1)
        for levels in (maps, positions)
    )
    batch, num_tokens = features.shape[:2]
    return FeatureTokens(
        features=features,
        positions=located,
        padding_mask=torch.zeros(batch, num_tokens, dtype=torch.bool),
        spatial_shapes=[(level.shape[2], level.shape[3]) for level in maps.values()],
        image_sizes=torch.ones(batch, 2),
        valid_ratios=torch.ones(batch, len(maps), 2),
        reference_points=torch.zeros(batch, num_tokens, len(maps), 2),
    )


def compare_scale_types(comparison: Comparison) -> None:
    """The first decoder layer by itself, with each type of scale."""
    fixture = comparison.fixture
    inputs = fixture.group("inputs/")
    memory = memory_of_one_level(inputs)
    for scale in sorted({name.split(".")[0] for name in fixture.group("out/")}):
        weights = fixture.group(f"weights/{scale}.")
        layer = build_decoder_layer(fixture, SCALES[scale], weights)
        recorder_input = inputs["tgt"] + inputs["query_pos"]
        attention = layer.cross_attention
        logits = attention.predict_reference_logits(recorder_input)
        points = logits.sigmoid()
        output = layer(inputs["tgt"], inputs["query_pos"], points, memory)
        gaussian = attention.log_gaussian(recorder_input, points, memory)
        comparison.close(f"out/{scale}.tgt", output, *LOGITS)
        comparison.close(f"out/{scale}.gaussian", gaussian, 1e-5, 1e-5)
        comparison.close(f"out/{scale}.init_center_logits", logits, *LOGITS)


def build_decoder_layer(fixture: Fixture, scale: Any, weights: Mapping[str, Tensor]) -> Any:
    config = fixture.config
    model = builder("smca", "smca")(
        backbone=None,
        channels=config["d_model"],
        num_heads=config["nhead"],
        hidden_channels=len(weights["linear1.weight"]),
        decoder_layers=1,
        num_queries=config["Q"],
        dropout=0.0,
        stride=STRIDE,
        scale=scale,
    )
    layer = instantiate(model.detector.decoder.layers[0]).eval()
    official = {f"transformer.decoder.layers.0.{key}": value for key, value in weights.items()}
    layer.load_state_dict(our_state(official, layouts.smca(), "detector.decoder.layers.0."))
    return layer


def memory_of_one_level(inputs: Mapping[str, Tensor]) -> FeatureTokens:
    """Memory of images that are padded to the largest width and height among them."""
    sizes = inputs["size_wh"]
    width, height = (math.ceil(size / STRIDE) for size in sizes.amax(0).tolist())
    return FeatureTokens(
        features=inputs["memory"],
        positions=inputs["pos"],
        padding_mask=inputs["mask"],
        spatial_shapes=[(height, width)],
        image_sizes=sizes.float(),
        valid_ratios=torch.ones(len(sizes), 1, 2),
        reference_points=torch.zeros(*inputs["mask"].shape, 1, 2),
    )
