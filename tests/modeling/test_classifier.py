"""The classifier around a backbone: its head, its normalisation, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor

from efficient_detr.errors import ConfigError, UserError
from efficient_detr.modeling.classifier import ImageClassifier


class Pixels(Backbone):
    """The images themselves as the map "p3"."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"p3": images}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"p3": ShapeSpec(channels=3, stride=1)}


def classifier(**changes: Any) -> ImageClassifier:
    """Its logits are the means of the normalised channels, and twice the first."""
    arguments: dict[str, Any] = dict(backbone=Pixels(), feature="p3", channels=3, num_classes=4)
    model = ImageClassifier(**arguments | changes)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [2.0, 0, 0]]))
        model.head.bias.zero_()
    return model


def image(red: int, green: int, blue: int, size: tuple[int, int] = (4, 6)) -> dict[str, Any]:
    pixels = torch.tensor([red, green, blue], dtype=torch.uint8)
    return {"image": pixels[:, None, None].expand(3, *size).contiguous()}


def test_logits_and_probabilities() -> None:
    """With mean 10 and deviation 5, channel values 20, 10 and 0 become 2, 0 and -2."""
    model = classifier(pixel_mean=[10.0] * 3, pixel_std=[5.0] * 3)
    first, second = model([image(20, 10, 0), image(10, 10, 10)])
    torch.testing.assert_close(first["logits"], torch.tensor([2.0, 0.0, -2.0, 4.0]))
    torch.testing.assert_close(first["probabilities"], first["logits"].softmax(0))
    torch.testing.assert_close(second["probabilities"], torch.full((4,), 0.25))


def test_the_mean_is_over_all_cells() -> None:
    images = torch.zeros(2, 3, 2, 5)
    images[1, 0, 1, 3] = 7.0  # one of ten cells
    expected = torch.tensor([[0.0, 0, 0, 0], [0.7, 0, 0, 1.4]])
    torch.testing.assert_close(classifier().classify(images), expected)


def test_normalisation_is_that_of_imagenet() -> None:
    """The published mean and deviation are 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225 of 255."""
    images = classifier().preprocess([image(255, 255, 255)])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images[0, :, 0, 0], (1 - mean) / std)


def test_state_dict_has_backbone_and_head_only() -> None:
    assert set(classifier().state_dict()) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("inputs", "text"),
    [([image(0, 0, 0), image(0, 0, 0, (4, 4))], "are 4x4, 4x6"), ([], "are none")],
)
def test_images_of_several_sizes(inputs: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(UserError, match=text):
        classifier()(inputs)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"feature": "p2"}, "model.feature=p2: the backbone gives p3"),
        ({"channels": 8}, "model.channels=8, but p3 of the backbone has 3"),
        ({"num_classes": 0}, "model.num_classes=0: give 1 class or more"),
        ({"input_format": "BGRR"}, "model.input_format=BGRR is unknown: use RGB or BGR"),
    ],
)
def test_a_head_that_does_not_fit(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        classifier(**change)


def test_gradients_reach_the_images() -> None:
    images = torch.randn(1, 3, 2, 2, requires_grad=True)
    classifier().classify(images)[0, 3].backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad[0, 0], torch.full((2, 2), 0.5))  # 2 / 4 cells
    assert not images.grad[0, 1:].any()
