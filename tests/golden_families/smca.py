"""Fixtures of SMCA-DETR: one level, several levels, and a convolutional encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention import DenseEncoderAttention
from efficient_detr.modeling.attention.gaussian_scale import (
    AxisProductScale,
    AxisScale,
    ConstantScale,
    HeadScale,
)
from efficient_detr.modeling.attention.intra_scale import IntraScaleAttention
from tests.golden_families.detr import backbone_maps, detr_arguments
from tests.golden_families.fixture import Comparison, Fixture, Reader
from tests.golden_families.models import build, builder, last_stages
from tests.golden_families.transformer import (
    Run,
    compare_evaluation,
    compare_predictions,
    compare_training,
)

# The official code differs from itself in float64 by up to 3.4e-6.
LOGITS = (1e-5, 0.0)

# Where a JSON does not say: the published models have as many.
NUM_HEADS = 8

SCALES = {
    "type1": ConstantScale,
    "type2": HeadScale,
    "type3": AxisScale,
    "type4": AxisProductScale,
}


class ModulatedRun(Run):
    """A run whose decoder modulates attention."""

    def attention(self, layer: int) -> Any:
        return self.model.detector.decoder.layers[layer].cross_attention

    def given(self, layer: int) -> dict[str, Any]:
        """Arguments of the cross-attention of a layer."""
        return self.recorder.arguments(self.attention(layer))

    def gaussian(self, layer: int) -> Tensor:
        """(B, H, Q, S) logarithms of the Gaussians."""
        given = self.given(layer)
        names = ("layer_input", "reference_boxes", "memory")
        return self.attention(layer).log_gaussian(*(given[name] for name in names))

    def weights(self, layer: int) -> Tensor:
        """(B, H, Q, S) attention of the queries."""
        return self.attention(layer).attention_weights(**self.given(layer))

    def normed(self, layer: int) -> Tensor:
        """(B, Q, C) what centres and scales are predicted from."""
        return self.attention(layer).norm(self.given(layer)["layer_input"])

    def offsets(self, layer: int) -> Tensor:
        """(B, Q, L H 2) offsets of the heads, in cells."""
        return self.attention(layer).head_offsets(self.normed(layer))

    def scales(self, layer: int) -> Tensor:
        """(B, Q, L H n) scales before they are squared."""
        return self.attention(layer).scale.projection(self.normed(layer))

    def squared_scales(self, layer: int) -> Tensor:
        """(B, Q, L, H, n) scales."""
        return self.attention(layer).scale(self.normed(layer)).permute(0, 3, 1, 2, 4)

    def level_weights(self, layer: int) -> Tensor:
        """(B, Q, L) weights of the levels."""
        return self.attention(layer).level_weights(self.given(layer)["layer_input"])

    def center_logits(self) -> Tensor:
        """(B, Q, 2) centres before the sigmoid."""
        return self.recorder.outputs(self.attention(0).center_prediction)[0]

    def centers_in_cells(self) -> Tensor:
        """(B, Q, 2) centres on the only level."""
        given = self.given(0)
        (stride,) = self.attention(0).strides
        return given["reference_boxes"] * given["memory"].image_sizes[:, None] / stride

    def head_centers(self, layer: int) -> Tensor:
        """(B, Q, H, 2) centres of the heads on the only level."""
        given = self.given(layer)
        names = ("layer_input", "reference_boxes", "memory")
        centers = self.attention(layer).centers(*(given[name] for name in names))
        return centers[:, 0].transpose(1, 2)

    def attended(self, layer: int) -> Tensor:
        return self.recorder.output(self.attention(layer))

    def modulation(self) -> dict[str, Reader]:
        """Readers of what the models have in common."""
        return self.stages() | {
            r"inter/dec(\d+)\.norm4_out": self.normed,
            r"inter/dec(\d+)\.offset_raw": self.offsets,
            r"inter/dec(\d+)\.scale_raw": self.scales,
            r"inter/dec(\d+)\.scale_sq": self.squared_scales,
            r"inter/dec(\d+)\.scale_sel": self.level_weights,
            r"inter/dec(\d+)\.gaussian": self.gaussian,
            r"inter/dec(\d+)\.attn_weights": self.weights,
            r"inter/dec(\d+)\.cross_attn_out": self.attended,
            r"inter/dec(\d+)\.head_center": self.head_centers,
            r"inter/dec(\d+)\.out_raw": self.decoder_layer,
            r"inter/init_center_logits": self.center_logits,
            r"inter/ref_center_grid": self.centers_in_cells,
        }

    def levels(self, strides: Mapping[int, int]) -> dict[str, Reader]:
        """Readers of maps that are named by the stride of their level; stride -> level."""

        def encoded(layer: int, stride: int) -> Tensor:
            features = self.tokens.split(self.encoder_layer(layer))[strides[stride]]
            if self.encodes_maps():
                shape = self.tokens.spatial_shapes[strides[stride]]
                return features.transpose(1, 2).unflatten(2, shape)
            return features

        return {
            r"inter/mask\.s(\d+)": lambda stride: self.mask(strides[stride]),
            r"inter/pos\.s(\d+)": lambda stride: self.position(strides[stride]),
            r"inter/proj\.s(\d+)": lambda stride: self.projected(strides[stride]),
            r"inter/enc(\d+)\.s(\d+)": encoded,
            r"inter/memory_s\d+_down": lambda: self.memory.level(0),
            r"inter/split": lambda: torch.tensor(self.memory.level_sizes[:-1]),
        }

    def encodes_maps(self) -> bool:
        """The fixture has maps (B, C, H_l, W_l) after encoder layers, not tokens (B, S_l, C)."""
        return hasattr(self.model.detector.encoder, "reduction")


# Single scale ------------------------------------------------------------------------------------


def single_config(fixture: Fixture) -> Any:
    config = fixture.config
    arguments = detr_arguments(config) | {"num_classes": config["class_logits"]}
    return builder("smca", "smca")(
        **arguments,
        stride=config["stride"],
        scale=SCALES[config["dynamic_scale"]],
        beta=config["smooth_beta"],
    )


def build_single(fixture: Fixture) -> EfficientDETR:
    config, maps = single_config(fixture), backbone_maps(fixture)
    return build(config, maps, fixture.weights(), fixture.info)


def compare_single(comparison: Comparison) -> None:
    fixture = comparison.fixture
    run = ModulatedRun.start(build_single(fixture).train(), fixture)
    comparison.read(run.modulation())
    compare_predictions(run, comparison, LOGITS)
    compare_training(run, comparison)
    compare_evaluation(build_single(fixture), comparison, ordered=False, logits=LOGITS)


# Several scales, with attention in the encoder ---------------------------------------------------


def multi_scale_config(fixture: Fixture) -> Any:
    config = fixture.config
    return builder("smca", "smca_multi_scale")(
        backbone=None,
        in_features=last_stages(len(config["ch"])),
        in_channels=config["ch"],
        num_classes=config["nc"] + 1,  # the last one never occurs
        channels=config["d"],
        num_heads=config.get("nhead", NUM_HEADS),
        hidden_channels=config["ff"],
        decoder_layers=config["dec"],
        num_queries=config["Q"],
        dropout=0.0,
        encoder_attentions=[
            DenseEncoderAttention if joint else IntraScaleAttention for joint in config["joint"]
        ],
        strides=config["strides"],
        distance_factors=config["factors"],
        beta=config["beta"],
    )


def build_multi_scale(fixture: Fixture) -> EfficientDETR:
    config, maps = multi_scale_config(fixture), backbone_maps(fixture)
    return build(config, maps, fixture.weights(), fixture.info)


def multi_scale_readers(run: ModulatedRun) -> dict[str, Reader]:
    """Readers of intermediate tensors; offsets are split by level and head."""

    def offsets(layer: int) -> Tensor:
        grid = (len(strides), run.attention(layer).num_heads, 2)
        return run.offsets(layer).unflatten(-1, grid)

    strides = [round(stride) for stride in run.attention(0).strides]
    levels = run.levels({stride: level for level, stride in enumerate(strides)})
    return run.modulation() | levels | {r"inter/dec(\d+)\.offset_raw": offsets}


def compare_multi_scale(comparison: Comparison) -> None:
    fixture = comparison.fixture
    run = ModulatedRun.start(build_multi_scale(fixture).train(), fixture)
    comparison.read(multi_scale_readers(run))
    compare_predictions(run, comparison, LOGITS)
    compare_training(run, comparison)
    model = build_multi_scale(fixture)
    compare_evaluation(model, comparison, ordered=False, logits=LOGITS)


# Several scales, with a convolutional encoder ----------------------------------------------------


def shares_convolutions(weights: Mapping[str, Tensor]) -> bool:
    """The layout has a number in the name of a convolution that belongs to one pair of levels."""
    return any(".high_to_low." in key for key in weights)


def numbers(name: str) -> list[int]:
    """The numbers in a name."""
    return [int(number) for number in re.findall(r"\d+", name)]


def build_conv(fixture: Fixture) -> EfficientDETR:
    config, weights = fixture.config, fixture.weights()
    # Finest first; "s8->16" is the level of stride 8 after it was brought to stride 16.
    factors = sorted(config["distance_factor"].items(), key=lambda item: numbers(item[0])[0])
    channels = sorted(config["feat_channels"].items(), key=lambda item: numbers(item[0])[-1])
    maps = {"backbone_channels": [count for _, count in channels]}
    sizes = detr_arguments(config | maps)
    model = builder("smca", "smca_conv")(
        **sizes | {"num_classes": config["class_logits"]},
        kernel_size=config["encoder_kernel"],
        shared=shares_convolutions(weights),
        strides=[numbers(name)[-1] for name, _ in factors],
        distance_factors=[factor for _, factor in factors],
        scale=SCALES[config["dynamic_scale"]],
        beta=config["smooth_beta"],
    )
    # The published code keeps the best 500, which may be more than there are queries.
    model.postprocessor.num_detections = 500
    return build(model, backbone_maps(fixture), weights, fixture.info)


def share_level_weights(model: EfficientDETR) -> EfficientDETR:
    """Give all images the level weights of the first one, as the published code does."""
    for layer in model.detector.decoder.layers:
        attention = layer.cross_attention
        own_weights = attention.level_weights

        def first(layer_input: Tensor, own_weights: Any = own_weights) -> Tensor:
            return own_weights(layer_input)[:1].expand(len(layer_input), -1, -1)

        attention.level_weights = first
    return model


class SharedWeightsRun(ModulatedRun):
    """A run of a model whose images share level weights."""

    def level_weights(self, layer: int) -> Tensor:
        """(B, Q, L) weights of the levels that each image has by itself."""
        attention = self.attention(layer)
        return type(attention).level_weights(attention, self.given(layer)["layer_input"])


def compare_conv(comparison: Comparison) -> None:
    """Compare with the official numbers, faulty as they are, then with the right ones."""
    fixture = comparison.fixture
    model = share_level_weights(build_conv(fixture).train())
    run = SharedWeightsRun.start(model, fixture)
    strides = sorted(numbers(name)[0] for name in fixture.config["distance_factor"])
    levels = run.levels({stride: level for level, stride in enumerate(strides)})
    comparison.read(run.modulation() | levels)
    compare_predictions(run, comparison, LOGITS)
    compare_training(run, comparison)
    model = share_level_weights(build_conv(fixture))
    compare_evaluation(model, comparison, ordered=False, logits=LOGITS)
    compare_images_alone(comparison)


def compare_images_alone(comparison: Comparison) -> None:
    """Compare a batch with what the official code gives for each of its images alone."""
    with torch.no_grad():
        run = Run.start(build_conv(comparison.fixture), comparison.fixture)
    decoder = run.output.decoder
    logits = {r"out_alone/(\d+)\.logits\.(\d+)": lambda b, layer: decoder.logits[layer, b]}
    comparison.read(logits, *LOGITS)
    comparison.read({r"out_alone/(\d+)\.boxes\.(\d+)": lambda b, layer: decoder.boxes[layer, b]})
