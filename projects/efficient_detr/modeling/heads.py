"""Class and box prediction from query or token features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from efficient_detr.modeling.layers import MLP


class PredictionHead(nn.Module):
    """A linear classifier and a three-layer box regressor.

    Heads that correct reference boxes start at them: the last box layer has zero weight and a given
    bias. Heads of focal-loss detectors start their classes at a small probability.

    Args:
        channels: C.
        num_classes: K.
        background_classes: further class logits, after the K, that stand for "no object" (DETR has
            one; sigmoid classifiers need none).
        prior_probability: class probability before training, in (0, 1); None for a random start.
        box_bias: bias of the last box layer, whose weight starts at zero; None for a random start.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        background_classes: int = 0,
        prior_probability: float | None = 0.01,
        box_bias: Sequence[float] | None = (0.0, 0.0, 0.0, 0.0),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.background_classes = background_classes
        self.class_layer = nn.Linear(channels, num_classes + background_classes)
        self.box_layers = MLP(sizes=[channels, channels, channels, 4])
        if prior_probability is not None:
            prior = -math.log((1 - prior_probability) / prior_probability)
            nn.init.constant_(self.class_layer.bias, prior)
        if box_bias is not None:
            nn.init.zeros_(self.box_layers.output.weight)
            with torch.no_grad():
                self.box_layers.output.bias.copy_(torch.tensor(list(box_bias)))

    def classify(self, features: Tensor) -> Tensor:
        """Class logits (..., K + background) of features (..., C), in float32 or better."""
        return _at_least_float32(self.class_layer(features))

    def regress(self, features: Tensor) -> Tensor:
        """Box logits (..., 4), in float32 or better: a correction where there are references."""
        return _at_least_float32(self.box_layers(features))


def _at_least_float32(predictions: Tensor) -> Tensor:
    """Boxes and scores near to each other would be equal in half precision."""
    return predictions.to(torch.promote_types(predictions.dtype, torch.float32))
