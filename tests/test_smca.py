"""The SMCA models as wholes: how they start, what their layers share, what gets gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.gaussian_scale import ConstantScale, HeadScale
from tests.tiny_models import MODELS, PatchBackbone, image_input, total, with_noise

SIZES: dict[str, Any] = dict(
    num_classes=3, channels=8, num_heads=2, hidden_channels=12, decoder_layers=2, num_queries=5
)
FAMILIES: dict[str, dict[str, Any]] = {
    "smca": dict(in_channels=(8,), encoder_layers=1),
    "smca_multi_scale": dict(in_features=("res4", "res5"), in_channels=(6, 8)),
    "smca_conv": dict(in_channels=(4, 6, 8), encoder_layers=1, kernel_size=3),
}


def tiny(family: str, **arguments: Any) -> Any:
    function = LazyConfig.load(str(MODELS / "smca.py"), family)
    backbone = L(PatchBackbone)(widths=[4, 6, 8])
    config = function(backbone=backbone, dropout=0.0, **SIZES, **{**FAMILIES[family], **arguments})
    return instantiate(config)


def inputs() -> list[dict[str, Any]]:
    return [
        image_input(96, 128, [[10, 10, 60, 50], [20, 30, 100, 90]], [0, 2]),
        image_input(128, 128, [[30, 40, 90, 120]], [1]),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_start(family: str) -> None:
    decoder = tiny(family).detector.decoder
    prior = torch.full((3,), -math.log(99))
    torch.testing.assert_close(decoder.heads[0].class_layer.bias, prior)
    assert decoder.heads[0].box_layers.output.weight.abs().min() > 0, "torch's start"
    assert len(decoder.heads) == 1, "shared by all layers"
    for index, layer in enumerate(decoder.layers):
        attention = layer.cross_attention
        assert attention.predicts_references == (index == 0)
        assert attention.scale.projection.weight.eq(0).all()
        assert attention.scale.projection.bias.eq(1).all()
        assert attention.head_offsets.weight.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_start_from_the_first_prediction(family: str) -> None:
    """With a box head that predicts 0, every layer's boxes are the centres with sides of 1/2."""
    model = tiny(family).eval()
    layers, head = model.detector.decoder.layers, model.detector.decoder.heads[0]
    torch.nn.init.zeros_(head.box_layers.output.weight)
    torch.nn.init.zeros_(head.box_layers.output.bias)
    seen: list[Tensor] = []
    for layer in layers:
        layer.cross_attention.register_forward_pre_hook(
            lambda module, arguments: seen.append(arguments[2])
        )
    mask = torch.zeros(1, 128, 128, dtype=torch.bool)
    output = model.detector(torch.randn(1, 3, 128, 128), mask).decoder
    position = model.detector.queries.position[None]  # contents are zero
    centers = layers[0].cross_attention.predict_reference_logits(position).sigmoid()
    for layer in range(2):
        torch.testing.assert_close(seen[layer], centers)
        torch.testing.assert_close(output.boxes[layer, ..., :2], centers)
        torch.testing.assert_close(output.boxes[layer, ..., 2:], torch.full((1, 5, 2), 0.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient(family: str) -> None:
    model = tiny(family)
    with_noise(model)
    total(model(inputs())).backward()
    silent = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 1e-9
    }
    # Contents are zero before the first layer: all values are the same, whatever the weight.
    assert silent <= {"detector.decoder.layers.0.self_attention.in_proj_weight"}


@pytest.mark.parametrize("scale", [ConstantScale, HeadScale])
def test_scale_is_a_part(scale: type) -> None:
    model = tiny("smca_multi_scale", scale=scale)
    for layer in model.detector.decoder.layers:
        assert type(layer.cross_attention.scale) is scale
    assert all(loss.isfinite() for loss in model(inputs()).values())


def test_a_batch_gives_what_its_images_give_alone() -> None:
    model = tiny("smca").eval()
    with_noise(model)
    with torch.no_grad():
        images = torch.zeros(2, 3, 128, 128)
        images[0, :, :64, :96] = torch.randn(3, 64, 96)
        images[1] = torch.randn(3, 128, 128)
        mask = torch.ones(2, 128, 128, dtype=torch.bool)
        mask[0, :64, :96] = False
        mask[1] = False
        together = model.detector(images, mask).decoder
        alone = model.detector(images[:1, :, :64, :96], mask[:1, :64, :96]).decoder
    torch.testing.assert_close(together.boxes[:, :1], alone.boxes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.logits[:, :1], alone.logits, atol=1e-4, rtol=1e-4)


def test_other_numbers_of_levels_are_refused() -> None:
    function = LazyConfig.load(str(MODELS / "smca.py"), "smca_multi_scale")
    config = function(
        backbone=L(PatchBackbone)(widths=[4, 6, 8]), **SIZES, **FAMILIES["smca_multi_scale"]
    )
    for layer in config.detector.decoder.layers:
        layer.cross_attention.strides = [16, 32]
        layer.cross_attention.distance_factors = [1.0, 1.0]
        layer.cross_attention.scale.num_levels = 2
    with pytest.raises(ConfigError, match=r"num_levels=2, but neck\.num_levels=3"):
        instantiate(config)
