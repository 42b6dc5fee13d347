"""Contrastive denoising (DINO, section 3.3): noised ground truth as extra queries in training.

Each of G groups holds M slots of positive and M of negative queries, M being the largest number of
boxes in an image. A positive query is a box moved by less than half its size, to be restored; a
negative one is moved further, to be rejected. Some labels are replaced by random ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efficient_detr.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from efficient_detr.errors import ConfigError
from efficient_detr.structures import DenoisingGroups, Queries, Targets


@dataclass(frozen=True)
class DenoisingNoise:
    """Random draws for R = 2 G T repeated boxes, kept apart so that they can be replayed.

    Attributes:
        label: (R,) uniform in [0, 1); a label is replaced below half the label noise ratio.
        new_labels: (R',) class indices for the replaced labels, in order.
        sign: (R, 4) each -1 or 1.
        amount: (R, 4) uniform in [0, 1), before 1 is added for negative queries.
    """

    label: Tensor
    new_labels: Tensor
    sign: Tensor
    amount: Tensor


class ContrastiveDenoising(nn.Module):
    """Prepend denoising queries to the matching queries.

    Args:
        num_classes: K.
        channels: C.
        num_queries: about how many positive queries an image gets (at least one group is made).
        label_noise_ratio: twice the probability that a label is replaced.
        box_noise_scale: largest shift of a positive corner, in half box sizes.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        num_queries: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.label_embedding = nn.Embedding(num_classes, channels)

    def forward(self, queries: Queries, targets: list[Targets]) -> Queries:
        """Put the denoising queries of a batch before its matching queries.

        A batch without any box gets a layout of no denoising queries. The label embedding still
        takes part in the graph, so that every parameter has a gradient, and the denoising losses
        exist and are zero, so that all processes of a distributed training report the same terms.

        Args:
            queries: the matching queries, without attention mask.
            targets: ground truth of the B images.
        """
        if queries.reference_boxes is None:
            raise ConfigError("denoising needs queries with reference boxes: use two-stage queries")
        groups = self.layout(targets)
        noise = self.draw_noise(targets, groups)
        labels, boxes = self.noised(targets, groups, noise)
        content, reference = self._fill_slots(labels, boxes, targets, groups, queries.content)
        return dataclasses.replace(
            queries,
            content=torch.cat([content, queries.content], dim=1),
            reference_boxes=torch.cat([reference, queries.reference_boxes], dim=1),
            attention_mask=denoising_mask(groups, queries.content),
            denoising=groups,
        )

    def layout(self, targets: list[Targets]) -> DenoisingGroups:
        """Number of groups and slots for a batch."""
        slots = max((len(target.labels) for target in targets), default=0)
        return DenoisingGroups(max(1, self.num_queries // max(slots, 1)), slots)

    def draw_noise(self, targets: list[Targets], groups: DenoisingGroups) -> DenoisingNoise:
        """Draw the noise of a batch from torch's global generator."""
        device = self.label_embedding.weight.device
        repeated = 2 * groups.num_groups * sum(len(target.labels) for target in targets)
        label = torch.rand(repeated, device=device)
        replaced = int((label < self.label_noise_ratio * 0.5).sum())
        new_labels = torch.randint(0, self.num_classes, (replaced,), device=device)
        sign = torch.randint(0, 2, (repeated, 4), device=device).float() * 2 - 1
        return DenoisingNoise(label, new_labels, sign, torch.rand(repeated, 4, device=device))

    def noised(
        self, targets: list[Targets], groups: DenoisingGroups, noise: DenoisingNoise
    ) -> tuple[Tensor, Tensor]:
        """Apply the noise to the boxes of the batch, repeated for each block of slots.

        Returns:
            labels (2 G, T) and box logits (2 G, T, 4); even blocks are positive, T counts the boxes
            of all images.
        """
        blocks = 2 * groups.num_groups
        labels = torch.cat([target.labels for target in targets]).repeat(blocks)
        replaced = noise.label < self.label_noise_ratio * 0.5
        labels = labels.masked_scatter(replaced, noise.new_labels.to(labels.dtype))
        boxes = torch.cat([target.boxes for target in targets]).repeat(blocks, 1)
        negative = torch.arange(blocks, device=boxes.device).remainder(2)
        amount = noise.amount + negative.repeat_interleave(len(boxes) // blocks)[:, None]
        half_sizes = boxes[:, 2:].repeat(1, 2) / 2
        shift = noise.sign * amount * half_sizes * self.box_noise_scale
        corners = (cxcywh_to_xyxy(boxes) + shift).clamp(0, 1)
        logits = inverse_sigmoid(xyxy_to_cxcywh(corners))
        return labels.reshape(blocks, -1), logits.reshape(blocks, -1, 4)

    def _fill_slots(
        self,
        labels: Tensor,
        box_logits: Tensor,
        targets: list[Targets],
        groups: DenoisingGroups,
        like: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Spread labels and boxes over the slots; empty slots have zero content and box logit."""
        embedded = self.label_embedding(labels).to(like.dtype)  # (2G, T, C)
        blocks, slots = 2 * groups.num_groups, groups.slots
        content = like.new_zeros(len(targets), blocks, slots, like.shape[-1])
        logits = box_logits.new_zeros(len(targets), blocks, slots, 4)
        image = torch.cat([torch.full_like(t.labels, i) for i, t in enumerate(targets)])
        slot = torch.cat([torch.arange(len(t.labels), device=image.device) for t in targets])
        content = content.transpose(1, 2).index_put((image, slot), embedded.transpose(0, 1))
        logits = logits.transpose(1, 2).index_put((image, slot), box_logits.transpose(0, 1))
        content = content.transpose(1, 2).flatten(1, 2)  # (B, 2GM, C)
        return content, logits.transpose(1, 2).flatten(1, 2).sigmoid()


def denoising_mask(groups: DenoisingGroups, matching: Tensor) -> Tensor:
    """Self-attention mask that keeps ground truth from leaking.

    Args:
        groups: layout of the denoising queries.
        matching: (B, Q, C) matching queries, for their number and device.

    Returns:
        (2GM + Q, 2GM + Q) bool, True = blocked. Matching queries see no denoising query; a group
        sees itself and the matching queries.
    """
    group_of = torch.arange(groups.num_queries, device=matching.device) // max(2 * groups.slots, 1)
    group_of = torch.cat([group_of, group_of.new_full((matching.shape[1],), -1)])
    return (group_of[None] != group_of[:, None]) & (group_of[None] >= 0)
