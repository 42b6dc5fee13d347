"""A backbone as it was trained on ImageNet: one label for the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, cast

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn

from efficient_detr.errors import ConfigError, UserError


class Classification(TypedDict):
    """What an image shows, in the opinion of a classifier.

    Attributes:
        logits: (K,) unnormalised scores.
        probabilities: (K,) their softmax, adding up to 1.
    """

    logits: Tensor
    probabilities: Tensor


class ImageClassifier(nn.Module):
    """Mean of a backbone's last map over all cells, and a linear layer.

    That is the head with which DAT and Swin were trained on ImageNet; a published classification
    checkpoint can be judged with it before its backbone goes under a detector. The backbone's own
    norm of the output is the norm of the head. Cells of padding would count as well, so images are
    not padded: a batch has one size.

    Args:
        backbone: gives the map by name, normalised.
        feature: name of the map.
        channels: C of the map.
        num_classes: K.
        pixel_mean: mean of each channel, in the units of the input image (0 to 255).
        pixel_std: standard deviation of each channel.
        input_format: channel order of the input images, "RGB" or "BGR".

    Raises:
        ConfigError: if there is no class, the channel order is unknown, or the backbone gives no
            such map, or another number of channels.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        feature: str,
        channels: int,
        num_classes: int,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        input_format: str = "RGB",
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ConfigError(f"model.num_classes={num_classes}: give 1 class or more.")
        if input_format not in ("RGB", "BGR"):
            raise ConfigError(f"model.input_format={input_format} is unknown: use RGB or BGR.")
        shapes = backbone.output_shape()
        if feature not in shapes:
            raise ConfigError(
                f"model.feature={feature}: the backbone gives {', '.join(shapes)}; name one of "
                "them, or add it to model.backbone.out_features."
            )
        if shapes[feature].channels != channels:
            raise ConfigError(
                f"model.channels={channels}, but {feature} of the backbone has "
                f"{shapes[feature].channels}."
            )
        self.backbone = backbone
        self.feature = feature
        self.num_classes = num_classes
        self.input_format = input_format
        self.head = nn.Linear(channels, num_classes)
        mean, std = torch.tensor(pixel_mean), torch.tensor(pixel_std)
        self.register_buffer("pixel_mean", mean[:, None, None], persistent=False)
        self.register_buffer("pixel_std", std[:, None, None], persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model, and so its computation, lives."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[Classification]:
        """Classify images.

        Args:
            batched_inputs: for each image a dict as of Detectron2's `DatasetMapper`: "image" (3, H,
                W) in 0 to 255, all of one size.

        Returns:
            For each image its `Classification`.

        Raises:
            UserError: if the images differ in size.
        """
        logits = self.classify(self.preprocess(batched_inputs))
        return [
            Classification(logits=image, probabilities=image.softmax(0))
            for image in logits.unbind(0)
        ]

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Normalise the images and stack them to (B, 3, H, W); arguments are those of `forward`."""
        sizes = {tuple(inputs["image"].shape[1:]) for inputs in batched_inputs}
        if len(sizes) != 1:
            raise UserError(
                "An image classifier takes images of one size at a time, but these are "
                f"{', '.join(f'{height}x{width}' for height, width in sorted(sizes)) or 'none'}."
            )
        images = torch.stack([inputs["image"].to(self.device) for inputs in batched_inputs])
        return (images - self.pixel_mean) / self.pixel_std

    def classify(self, images: Tensor) -> Tensor:
        """Logits of normalised images.

        Args:
            images: (B, 3, H, W), less the mean and divided by the standard deviation.

        Returns:
            (B, K) logits.
        """
        features = cast(dict[str, Tensor], self.backbone(images))[self.feature]
        return self.head(features.mean((2, 3)))
