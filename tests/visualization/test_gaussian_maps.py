"""Pictures of Gaussians and attention, from a small model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate

from efficient_detr.errors import UserError
from efficient_detr.visualization.gaussian_maps import (
    collect_gaussian_examples,
    gaussian_maps_figure,
    save_gaussian_maps,
)
from tests.tiny_models import MODELS, PatchBackbone, image_input

HEADS = 2


def small_model(name: str = "smca", file: str = "smca", **arguments: Any) -> Any:
    """An untrained SMCA over `PatchBackbone`, whose last map has stride 32."""
    sizes = dict(channels=8, num_heads=HEADS, hidden_channels=12, decoder_layers=2, num_queries=5)
    sizes.update(num_classes=3, backbone=L(PatchBackbone)(widths=[4, 6, 8]), **arguments)
    return instantiate(LazyConfig.load(str(MODELS / f"{file}.py"), name)(**sizes))


@pytest.fixture(scope="module")
def single() -> Any:
    return small_model(in_channels=(8,), encoder_layers=1)


def test_examples_tell_where_queries_look(single: Any) -> None:
    """Offsets are zeroed and the centre predicted at (1/2, 1/4) of 96 x 64 pixels."""
    layers = single.detector.decoder.layers
    with torch.no_grad():
        for layer in layers:
            layer.cross_attention.head_offsets.weight.zero_()
            layer.cross_attention.head_offsets.bias.zero_()
        output = layers[0].cross_attention.center_prediction.output
        output.weight.zero_()
        output.bias.copy_(torch.tensor([0.0, -np.log(3.0)]))
    inputs = [image_input(64, 96), image_input(128, 64)]
    single.train()
    examples = collect_gaussian_examples(single, inputs, queries=[4, 0])
    assert single.training
    assert [example.query for example in examples] == [4, 0, 4, 0]
    first = examples[0]
    assert first.padded_size == (128, 96) and first.image.shape == (64, 96, 3)
    # 1.5 and 0.5 cells of 32 pixels; a cell's middle is half a cell further.
    np.testing.assert_allclose(first.centers, [[64.0, 32.0]] * HEADS, atol=1e-4)
    assert first.gaussians.shape == first.attention.shape == (HEADS, 4, 3)
    # Cell (1, 0) is half a cell away both ways: exp(-(0.25 + 0.25) / 8).
    np.testing.assert_allclose(first.gaussians[:, 0, 1], np.exp(-0.5 / 8), atol=1e-6)
    np.testing.assert_allclose(first.attention.sum((1, 2)), 1, atol=1e-5)
    assert (first.attention[:, 2:] == 0).all(), "padding"
    assert first.level == 0 and first.share == 1
    x0, y0, x1, y1 = first.box
    assert 0 < x1 - x0 < 96 and 0 < y1 - y0 < 64, "sides are sigmoids of the image's"


def test_the_best_queries_are_the_default(single: Any) -> None:
    image = image_input(64, 96)
    examples = collect_gaussian_examples(single, [image], layer=0)
    assert len(examples) == 2 and examples[0].query != examples[1].query


def test_the_level_with_the_largest_share_is_shown() -> None:
    model = small_model("smca_multi_scale", in_features=("res4", "res5"), in_channels=(6, 8))
    attention = model.detector.decoder.layers[1].cross_attention
    with torch.no_grad():
        attention.level_selection.bias.copy_(torch.tensor([0.0, 0.0, 20.0]))
    (example,) = collect_gaussian_examples(model, [image_input(64, 96)], queries=[1])
    assert example.level == 2 and example.share > 0.99
    assert example.gaussians.shape == (HEADS, 1, 2)  # stride 64


def test_figure(single: Any, tmp_path: Any) -> None:
    examples = collect_gaussian_examples(single, [image_input(64, 96)], queries=[3, 1])
    figure = gaussian_maps_figure(examples)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[: 1 + HEADS] == ["query 3", "Gaussian, head 0", "Gaussian, head 1"]
    assert titles[1 + HEADS : 2 + 2 * HEADS][1:] == ["attention, head 0", "attention, head 1"]
    panel = figure.axes[1]
    x, y = panel.lines[0].get_xydata()[0]
    np.testing.assert_allclose([x, y], examples[0].centers[0] * 360 / 96, atol=1e-6)
    path = save_gaussian_maps(examples, tmp_path / "maps.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layer=2), "no decoder layer 2: layers are 0 to 1"),
        (dict(queries=[5]), "no query 5: queries are 0 to 4"),
    ],
)
def test_what_is_not_there(single: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        collect_gaussian_examples(single, [image_input(64, 96)], **arguments)
    assert not single.detector._forward_hooks


def test_a_model_without_gaussians() -> None:
    model = small_model("detr", "detr", in_channels=(8,), encoder_layers=1)
    with pytest.raises(UserError, match="DenseDecoderAttention, which has no Gaussians"):
        collect_gaussian_examples(model, [image_input(64, 96)])
