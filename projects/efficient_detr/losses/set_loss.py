"""The matched set loss: classes, box distance and generalised IoU.

The same loss serves the last decoder layer, the auxiliary layers (suffix `_0`, `_1`, ...), the
encoder's proposals (`_enc`), the encoder's layers (`_enc_0`, ...) and the denoising queries (`_dn`,
`_dn_0`, ...). Only the matching differs: predictions and proposals are matched by cost, each on its
own; a denoising query belongs to the box that it was made from.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.distributed
import torch.nn.functional as F
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from efficient_detr.boxes import cxcywh_to_xyxy, generalized_iou
from efficient_detr.losses.interface import DetectorLoss
from efficient_detr.losses.matcher import HungarianMatcher, Matching
from efficient_detr.structures import (
    DecoderOutput,
    DenoisingGroups,
    DetectorOutput,
    SetPrediction,
    Targets,
)


class FocalClassLoss(nn.Module):
    """Sigmoid focal loss (Lin et al. 2017) over all queries and classes; background is all zeros.

    Args:
        alpha: weight of positives, in (0, 1).
        gamma: focusing exponent.
    """

    background_classes: ClassVar[int] = 0

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(
        self, logits: Tensor, matching: Matching, targets: list[Targets], num_boxes: float
    ) -> Tensor:
        """Loss of logits (B, Q, K), summed and divided by the number of boxes."""
        wanted = torch.zeros_like(logits)
        for image, (queries, boxes) in enumerate(matching):
            wanted[image, queries, targets[image].labels[boxes]] = 1
        loss = sigmoid_focal_loss(logits, wanted, self.alpha, self.gamma, reduction="sum")
        return loss / num_boxes


class SoftmaxClassLoss(nn.Module):
    """Cross entropy with the last class for queries without a box (DETR, equation 2).

    Args:
        no_object_weight: weight of those queries, in (0, 1]; they are many.
    """

    background_classes: ClassVar[int] = 1

    def __init__(self, *, no_object_weight: float = 0.1) -> None:
        super().__init__()
        self.no_object_weight = no_object_weight

    def forward(
        self, logits: Tensor, matching: Matching, targets: list[Targets], num_boxes: float
    ) -> Tensor:
        """Weighted mean of the loss of logits (B, Q, K + 1): divided by the sum of the weights."""
        no_object = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:2], no_object, device=logits.device)
        for image, (queries, boxes) in enumerate(matching):
            wanted[image, queries] = targets[image].labels[boxes]
        weights = logits.new_ones(no_object + 1)
        weights[no_object] = self.no_object_weight
        total = F.cross_entropy(logits.transpose(1, 2), wanted, weights, reduction="sum")
        # Without any query (denoising of a batch without boxes) the loss is 0, not 0 / 0.
        return total / weights[wanted].sum().clamp(min=self.no_object_weight)


class SetLoss(DetectorLoss):
    """Weighted terms `loss_class`, `loss_bbox` and `loss_giou` for every set of predictions.

    Args:
        matcher: assigns boxes to queries.
        class_loss: loss of the classes.
        class_weight: factor of `loss_class`.
        box_weight: factor of `loss_bbox`, the L1 distance of (cx, cy, w, h).
        giou_weight: factor of `loss_giou`, one minus the generalised IoU.
    """

    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        class_loss: nn.Module,
        class_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
    ) -> None:
        super().__init__()
        self.matcher = matcher
        self.class_loss = class_loss
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight

    def forward(self, output: DetectorOutput, targets: list[Targets]) -> dict[str, Tensor]:
        """Losses of all prediction sets of a batch."""
        num_boxes = average_num_boxes(targets)
        losses: dict[str, Tensor] = {}
        for suffix, prediction in matched_predictions(output):
            wanted = [class_agnostic(t) for t in targets] if prediction.class_agnostic else targets
            matching = self.matcher(prediction, wanted)
            losses |= self.terms(prediction, matching, wanted, num_boxes, suffix)
        if output.denoising is not None and output.denoising_groups is not None:
            groups = output.denoising_groups
            matching = denoising_matching(groups, targets)
            for suffix, prediction in layer_predictions(output.denoising):
                total = num_boxes * groups.num_groups
                losses |= self.terms(prediction, matching, targets, total, "_dn" + suffix)
        return losses

    def terms(
        self,
        prediction: SetPrediction,
        matching: Matching,
        targets: list[Targets],
        num_boxes: float,
        suffix: str,
    ) -> dict[str, Tensor]:
        """The three weighted terms of one set of predictions."""
        predicted = torch.cat(
            [boxes[queries] for boxes, (queries, _) in zip(prediction.boxes, matching, strict=True)]
        )
        wanted = torch.cat(
            [target.boxes[boxes] for target, (_, boxes) in zip(targets, matching, strict=True)]
        )
        class_loss = self.class_loss(prediction.logits, matching, targets, num_boxes)
        box_loss = F.l1_loss(predicted, wanted, reduction="sum")
        giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
        return {
            f"loss_class{suffix}": self.class_weight * class_loss,
            f"loss_bbox{suffix}": self.box_weight * box_loss / num_boxes,
            f"loss_giou{suffix}": self.giou_weight * (1 - giou).sum() / num_boxes,
        }


def matched_predictions(output: DetectorOutput) -> list[tuple[str, SetPrediction]]:
    """(suffix, prediction) of every set that is matched by cost."""
    predictions = layer_predictions(output.decoder)
    if output.proposal is not None:
        predictions.append(("_enc", output.proposal))
    predictions += [(f"_enc_{i}", layer) for i, layer in enumerate(output.encoder_layers)]
    return predictions


def class_agnostic(target: Targets) -> Targets:
    """The same boxes, all of class 0."""
    return dataclasses.replace(target, labels=torch.zeros_like(target.labels))


def layer_predictions(output: DecoderOutput) -> list[tuple[str, SetPrediction]]:
    """(suffix, prediction) of every decoder layer: no suffix for the last, else its number."""
    last = len(output.logits) - 1
    return [("" if i == last else f"_{i}", output.layer(i)) for i in range(last + 1)]


def average_num_boxes(targets: list[Targets]) -> float:
    """Boxes of the batch, averaged over processes, at least 1."""
    count = float(sum(len(target.labels) for target in targets))
    if comm.get_world_size() > 1:
        total = torch.tensor(count, device=targets[0].labels.device)
        torch.distributed.all_reduce(total)
        count = total.item() / comm.get_world_size()
    return max(count, 1.0)


def denoising_matching(groups: DenoisingGroups, targets: list[Targets]) -> Matching:
    """Positive slot k of every group belongs to box k; all other slots are background."""
    matching = []
    for target in targets:
        count, device = len(target.labels), target.labels.device
        starts = 2 * groups.slots * torch.arange(groups.num_groups, device=device)
        boxes = torch.arange(count, device=device)
        queries = (starts[:, None] + boxes).flatten()
        matching.append((queries, boxes.repeat(groups.num_groups)))
    return matching
