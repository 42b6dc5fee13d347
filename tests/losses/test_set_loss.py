"""The matched set loss by hand: terms, normalisation, suffixes, denoising."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.losses import FocalClassCost, FocalClassLoss, HungarianMatcher, SetLoss
from efficient_detr.losses.set_loss import average_num_boxes, denoising_matching
from efficient_detr.structures import (
    DecoderOutput,
    DenoisingGroups,
    DetectorOutput,
    SetPrediction,
    Targets,
)
from tests.tiny_models import logit, targets_of

BOX = [0.5, 0.5, 0.2, 0.2]


def set_loss(**weights: float) -> SetLoss:
    return SetLoss(
        matcher=HungarianMatcher(class_cost=FocalClassCost()),
        class_loss=FocalClassLoss(),
        **weights,
    )


def decoder_output(logits: Tensor, boxes: Tensor) -> DecoderOutput:
    """(layers, B, Q, K) and (layers, B, Q, 4)."""
    return DecoderOutput(logits, boxes, boxes)


def output_of(logits: Tensor, boxes: Tensor, **fields: Any) -> DetectorOutput:
    return DetectorOutput(
        decoder=decoder_output(logits[None], boxes[None]), spatial_shapes=[], **fields
    )


def focal(probability: float, positive: bool) -> float:
    """-alpha_t (1 - p_t)^2 log p_t with alpha 1/4 for positives and 3/4 for negatives."""
    p, alpha = (probability, 0.25) if positive else (1 - probability, 0.75)
    return -alpha * (1 - p) ** 2 * math.log(p)


def test_focal_class_loss() -> None:
    """Two queries, two classes; query 1 is matched to a box of class 0."""
    probabilities = [[0.1, 0.3], [0.8, 0.4]]
    logits = torch.tensor([[[logit(p) for p in row] for row in probabilities]])
    matching = [(torch.tensor([1]), torch.tensor([0]))]
    loss = FocalClassLoss()(logits, matching, targets_of([BOX], labels=[[0]]))
    expected = focal(0.1, False) + focal(0.3, False) + focal(0.8, True) + focal(0.4, False)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_focal_class_loss_follows_the_matched_box() -> None:
    """Box 1 (class 0), not box 0 (class 1), belongs to query 0."""
    logits = torch.tensor([[[logit(0.6), logit(0.2)]]])
    matching = [(torch.tensor([0]), torch.tensor([1]))]
    loss = FocalClassLoss()(logits, matching, targets_of([BOX, BOX], labels=[[1, 0]]))
    assert loss.item() == pytest.approx(focal(0.6, True) + focal(0.2, False), rel=1e-5)


def test_terms() -> None:
    """One query on each of two boxes: moved by 0.1 to the right, and exact.

    L1: 0.1 + 0. GIoU: overlap 0.02, union 0.06, hull 0.06, so 1/3; and 1. Two boxes normalise.
    """
    boxes = torch.tensor([[[0.6, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]]])
    logits = torch.full((1, 2, 1), logit(0.5))
    targets = targets_of([BOX, [0.2, 0.2, 0.1, 0.1]], labels=[[0, 0]])
    losses = set_loss()(output_of(logits, boxes), targets)
    assert losses.keys() == {"loss_class", "loss_bbox", "loss_giou"}
    values = {name: value.item() for name, value in losses.items()}
    assert values["loss_class"] == pytest.approx(2 * focal(0.5, True) / 2, rel=1e-5)
    assert values["loss_bbox"] == pytest.approx(5 * 0.1 / 2, rel=1e-5)
    assert values["loss_giou"] == pytest.approx(2 * (2 / 3 + 0) / 2, rel=1e-4, abs=1e-6)
    weighted = set_loss(class_weight=2.0, box_weight=1.0, giou_weight=0.5)(
        output_of(logits, boxes), targets
    )
    for name, factor in (("loss_class", 2 / 1), ("loss_bbox", 1 / 5), ("loss_giou", 0.5 / 2)):
        assert weighted[name].item() == pytest.approx(factor * values[name], rel=1e-5)


def test_boxes_of_the_whole_batch_normalise() -> None:
    """Three boxes in two images; an image without boxes contributes its background."""
    logits, boxes = torch.zeros(3, 4, 2), torch.rand(3, 4, 4) * 0.5 + 0.2
    targets = targets_of([BOX], [BOX, BOX], [])
    loss = set_loss()(output_of(logits, boxes), targets)["loss_class"]
    # 24 logits, 3 of which are matched.
    expected = (3 * focal(0.5, True) + 21 * focal(0.5, False)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_number_of_boxes() -> None:
    assert average_num_boxes(targets_of([BOX], [BOX, BOX])) == 3.0
    assert average_num_boxes(targets_of([], [])) == 1.0


def test_suffixes_and_their_own_matching() -> None:
    """Three layers: each is matched on its own, so a box may change its query."""
    first, second = [0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]
    boxes = torch.tensor([[[first, second]], [[second, first]], [[second, first]]])
    logits = torch.zeros(3, 1, 2, 1)
    output = DetectorOutput(
        decoder=decoder_output(logits, boxes),
        spatial_shapes=[],
        proposal=SetPrediction(logits[0], boxes[0]),
    )
    losses = set_loss()(output, targets_of([first], labels=[[0]]))
    assert losses.keys() == {
        f"loss_{term}{suffix}"
        for term in ("class", "bbox", "giou")
        for suffix in ("", "_0", "_1", "_enc")
    }
    for name, value in losses.items():
        if not name.startswith("loss_class"):
            assert value.item() == pytest.approx(0, abs=1e-6), name


def test_denoising_matching() -> None:
    """Two groups of 3 positive and 3 negative slots: positives are slots 0 to 2 and 6 to 8."""
    groups = DenoisingGroups(num_groups=2, slots=3)
    targets = targets_of([BOX, BOX, BOX], [BOX], [])
    matching = [(q.tolist(), b.tolist()) for q, b in denoising_matching(groups, targets)]
    assert matching == [
        ([0, 1, 2, 6, 7, 8], [0, 1, 2, 0, 1, 2]),
        ([0, 6], [0, 0]),
        ([], []),
    ]


def test_denoising_loss() -> None:
    """One box, two groups of one slot: queries + - + -, normalised by 1 box x 2 groups.

    The positives are 0.1 off in x, the negatives far away, which must not count for the boxes.
    """
    near, far = [0.6, 0.5, 0.2, 0.2], [0.1, 0.9, 0.05, 0.05]
    boxes = torch.tensor([[near, far, near, far]])
    logits = torch.tensor([[[logit(0.8)], [logit(0.3)], [logit(0.8)], [logit(0.3)]]])
    output = output_of(
        torch.zeros(1, 2, 1),
        torch.full((1, 2, 4), 0.5),
        denoising=decoder_output(logits[None], boxes[None]),
        denoising_groups=DenoisingGroups(num_groups=2, slots=1),
    )
    losses = set_loss()(output, targets_of([BOX], labels=[[0]]))
    assert losses["loss_bbox_dn"].item() == pytest.approx(5 * 2 * 0.1 / 2, rel=1e-4)
    assert losses["loss_giou_dn"].item() == pytest.approx(2 * 2 * (2 / 3) / 2, rel=1e-4)
    expected = 2 * (focal(0.8, True) + focal(0.3, False)) / 2
    assert losses["loss_class_dn"].item() == pytest.approx(expected, rel=1e-5)


def empty_output(layers: int = 2) -> DetectorOutput:
    groups = DenoisingGroups(num_groups=100, slots=0)
    logits = torch.randn(layers, 2, 3, 4, requires_grad=True)
    boxes = torch.rand(layers, 2, 3, 4, requires_grad=True)
    return DetectorOutput(
        decoder=decoder_output(logits, boxes),
        spatial_shapes=[],
        proposal=SetPrediction(logits[0], boxes[0]),
        denoising=DecoderOutput(logits[:, :, :0], boxes[:, :, :0], boxes[:, :, :0]),
        denoising_groups=groups,
    )


def test_batch_without_boxes() -> None:
    """All terms of a batch with boxes exist, are finite, and have a gradient."""
    targets: list[Targets] = targets_of([], [])
    output = empty_output()
    losses = set_loss()(output, targets)
    suffixes = ("", "_0", "_enc", "_dn", "_dn_0")
    assert losses.keys() == {
        f"loss_{term}{suffix}" for term in ("class", "bbox", "giou") for suffix in suffixes
    }
    for name, value in losses.items():
        assert value.isfinite() and value.requires_grad, name
        if not name.startswith("loss_class") or "_dn" in name:
            assert value.item() == 0, name
    assert losses["loss_class"].item() > 0, "background is learned from images without boxes"
    torch.stack(list(losses.values())).sum().backward()
    for tensor in (output.decoder.logits, output.decoder.boxes):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
