"""Class and box prediction from query or token features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from efficient_detr.modeling.layers import MLP


class PredictionHead(nn.Module):
    """A linear classifier and a three-layer box regressor.

    Boxes start at their reference: the last box layer is zero. Classes start at probability
    `prior_probability`, as in focal-loss detectors.

    Args:
        channels: C.
        num_classes: K, sigmoid classes without a background class.
        prior_probability: class probability before training.
    """

    def __init__(self, *, channels: int, num_classes: int, prior_probability: float = 0.01) -> None:
        super().__init__()
        self.class_layer = nn.Linear(channels, num_classes)
        prior = -math.log((1 - prior_probability) / prior_probability)
        nn.init.constant_(self.class_layer.bias, prior)
        self.box_layers = MLP(sizes=[channels, channels, channels, 4])
        nn.init.zeros_(self.box_layers.output.weight)
        nn.init.zeros_(self.box_layers.output.bias)

    def classify(self, features: Tensor) -> Tensor:
        """Class logits (..., K) of features (..., C), in float32 or better."""
        return _at_least_float32(self.class_layer(features))

    def regress(self, features: Tensor) -> Tensor:
        """Correction (..., 4), in float32 or better, added to the logit of a reference box."""
        return _at_least_float32(self.box_layers(features))


def _at_least_float32(predictions: Tensor) -> Tensor:
    """Boxes and scores near to each other would be equal in half precision."""
    return predictions.to(torch.promote_types(predictions.dtype, torch.float32))
