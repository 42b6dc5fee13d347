"""Class and box prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficient_detr.boxes import inverse_sigmoid
from efficient_detr.modeling.heads import PredictionHead


@pytest.mark.parametrize("num_classes", [1, 91])
def test_shapes(num_classes: int) -> None:
    head = PredictionHead(channels=8, num_classes=num_classes)
    assert head.classify(torch.randn(2, 5, 8)).shape == (2, 5, num_classes)
    assert head.regress(torch.randn(2, 5, 8)).shape == (2, 5, 4)


def test_classes_start_at_the_prior() -> None:
    """Without features only the bias speaks: sigmoid(-log(99)) = 1/100."""
    head = PredictionHead(channels=8, num_classes=3)
    torch.testing.assert_close(head.classify(torch.zeros(1, 8)).sigmoid(), torch.full((1, 3), 0.01))
    head = PredictionHead(channels=8, num_classes=3, prior_probability=0.2)
    torch.testing.assert_close(head.classify(torch.zeros(1, 8)).sigmoid(), torch.full((1, 3), 0.2))


def test_boxes_start_at_their_reference() -> None:
    head = PredictionHead(channels=8, num_classes=3)
    reference = torch.rand(6, 4) * 0.9 + 0.05
    boxes = (head.regress(torch.randn(6, 8)) + inverse_sigmoid(reference)).sigmoid()
    torch.testing.assert_close(boxes, reference)


def test_hidden_box_layers_start_as_torch_starts_them() -> None:
    """Uniform within 1 / sqrt(fan in), for weights and biases; only the last layer is zero."""
    layers: Any = PredictionHead(channels=64, num_classes=3).box_layers.layers
    for layer in layers[:-1]:
        for tensor in (layer.weight, layer.bias):
            assert 0.8 < tensor.abs().max() * 8 <= 1
    assert layers[-1].weight.eq(0).all() and layers[-1].bias.eq(0).all()


def test_predictions_are_float32_under_autocast() -> None:
    head = PredictionHead(channels=8, num_classes=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = head.class_layer.weight.new_ones(1, 8)
        assert head.classify(features).dtype is torch.float32
        assert head.regress(features).dtype is torch.float32


def test_background_classes_follow_the_classes() -> None:
    head = PredictionHead(channels=8, num_classes=3, background_classes=1)
    assert head.classify(torch.randn(2, 5, 8)).shape == (2, 5, 4)
    assert head.regress(torch.randn(2, 5, 8)).shape == (2, 5, 4)
    assert head.class_layer.weight.shape == (4, 8)


def test_random_start() -> None:
    """DETR: classes and boxes start as torch starts them, uniform within 1 / sqrt(fan in)."""
    head: Any = PredictionHead(
        channels=64, num_classes=90, background_classes=1, prior_probability=None, box_bias=None
    )
    for layer in (head.class_layer, *head.box_layers.layers):
        assert 0.8 < layer.weight.abs().max() * 8 <= 1
    assert 0.8 < head.class_layer.bias.abs().max() * 8 <= 1
    assert 0 < head.box_layers.output.bias.abs().max() * 8 <= 1


def test_box_bias() -> None:
    """Deformable DETR starts boxes small: sigmoid(-2) of the image; the features say nothing."""
    head = PredictionHead(channels=8, num_classes=3, box_bias=(0.0, 0.0, -2.0, -2.0))
    expected = torch.tensor([0.0, 0.0, -2.0, -2.0]).expand(6, 4)
    assert torch.equal(head.regress(torch.randn(6, 8)), expected)
