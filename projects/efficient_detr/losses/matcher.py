"""Bipartite matching of predictions and ground truth (DETR, equation 1)."""

from __future__ import annotations

from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from efficient_detr.boxes import cxcywh_to_xyxy, generalized_iou
from efficient_detr.errors import NonFiniteLossError
from efficient_detr.structures import SetPrediction, Targets

Matching = list[tuple[Tensor, Tensor]]
"""For each image the indices of matched queries and of their boxes, both (T,)."""


class FocalClassCost(nn.Module):
    """Cost of a class under the focal loss: loss as a positive minus loss as a negative.

    Args:
        alpha: weight of positives, in (0, 1).
        gamma: focusing exponent.
    """

    background_classes: ClassVar[int] = 0

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(Q, T) cost of giving each query (logits (Q, K)) each of the labels (T,)."""
        probability = logits.sigmoid()
        # 1e-8 inside the logarithm is part of the published matcher.
        positive = self.alpha * (1 - probability) ** self.gamma * -(probability + 1e-8).log()
        negative = (1 - self.alpha) * probability**self.gamma * -(1 - probability + 1e-8).log()
        return (positive - negative)[:, labels]


class SoftmaxClassCost(nn.Module):
    """Cost of a class under the softmax: minus its probability (DETR, section 3.1)."""

    background_classes: ClassVar[int] = 1

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(Q, T) cost of giving each query (logits (Q, K + 1)) each of the labels (T,)."""
        return -logits.softmax(-1)[:, labels]


class HungarianMatcher(nn.Module):
    """Cheapest one-to-one assignment of boxes to queries, image by image.

    Args:
        class_cost: cost of a query taking a label.
        class_weight: factor of the class cost.
        box_weight: factor of the L1 distance of (cx, cy, w, h).
        giou_weight: factor of the negative generalised IoU.
    """

    def __init__(
        self,
        *,
        class_cost: nn.Module,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
    ) -> None:
        super().__init__()
        self.class_cost = class_cost
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight

    @torch.no_grad()
    def forward(self, prediction: SetPrediction, targets: list[Targets]) -> Matching:
        """Match every image of the batch.

        Raises:
            NonFiniteLossError: if a prediction is not finite.
        """
        cost = self.cost(prediction, targets).cpu()  # one transfer for the whole batch
        if not cost.isfinite().all():
            raise NonFiniteLossError(
                "the predictions are not finite: lower optimizer.lr, or train.clip_max_norm to "
                "clip gradients harder"
            )
        matching = []
        image_costs = cost.split([len(target.labels) for target in targets], dim=2)
        for image, target in enumerate(targets):
            pairs = linear_sum_assignment(image_costs[image][image].numpy())
            queries, boxes = (torch.as_tensor(i, device=target.labels.device) for i in pairs)
            matching.append((queries, boxes))
        return matching

    def cost(self, prediction: SetPrediction, targets: list[Targets]) -> Tensor:
        """(B, Q, T) cost of each query for each box of the batch, those of other images too."""
        labels = torch.cat([target.labels for target in targets])
        wanted = torch.cat([target.boxes for target in targets])
        logits, boxes = prediction.logits.flatten(0, 1), prediction.boxes.flatten(0, 1)
        giou = generalized_iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(wanted)[None])
        cost = (
            self.class_weight * self.class_cost(logits, labels)
            + self.box_weight * torch.cdist(boxes, wanted, p=1)
            - self.giou_weight * giou
        )
        return cost.unflatten(0, prediction.logits.shape[:2])
