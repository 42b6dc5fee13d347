"""The matched set loss: classes, box distance and generalised IoU.

The same loss serves the last decoder layer, the auxiliary layers (suffix `_0`, `_1`, ...), the
encoder's proposals (`_enc`) and the denoising queries (`_dn`, `_dn_0`, ...). Only the matching
differs: predictions and proposals are matched by cost, each on its own; a denoising query belongs
to the box that it was made from.
"""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from efficient_detr.boxes import cxcywh_to_xyxy, generalized_iou
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

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, matching: Matching, targets: list[Targets]) -> Tensor:
        """Sum of the loss of logits (B, Q, K); unmatched queries are background."""
        wanted = torch.zeros_like(logits)
        for image, (queries, boxes) in enumerate(matching):
            wanted[image, queries, targets[image].labels[boxes]] = 1
        return sigmoid_focal_loss(logits, wanted, self.alpha, self.gamma, reduction="sum")


class SetLoss(nn.Module):
    """Weighted terms `loss_class`, `loss_bbox` and `loss_giou` for every set of predictions.

    Args:
        matcher: assigns boxes to queries.
        class_loss: loss of the classes, summed over the batch.
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
        """Losses of all prediction sets of a batch, each divided by the number of boxes."""
        num_boxes = average_num_boxes(targets)
        losses: dict[str, Tensor] = {}
        for suffix, prediction in layer_predictions(output.decoder):
            matching = self.matcher(prediction, targets)
            losses |= self.terms(prediction, matching, targets, num_boxes, suffix)
        if output.proposal is not None:
            matching = self.matcher(output.proposal, targets)
            losses |= self.terms(output.proposal, matching, targets, num_boxes, "_enc")
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
        class_loss = self.class_loss(prediction.logits, matching, targets)
        box_loss = F.l1_loss(predicted, wanted, reduction="sum")
        giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
        return {
            f"loss_class{suffix}": self.class_weight * class_loss / num_boxes,
            f"loss_bbox{suffix}": self.box_weight * box_loss / num_boxes,
            f"loss_giou{suffix}": self.giou_weight * (1 - giou).sum() / num_boxes,
        }


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
