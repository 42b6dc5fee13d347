"""The matched set loss by hand: terms, normalisation, suffixes, denoising."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.losses import (
    FocalClassCost,
    FocalClassLoss,
    HungarianMatcher,
    SetLoss,
    SoftmaxClassCost,
    SoftmaxClassLoss,
)
from efficient_detr.losses.set_loss import average_num_boxes, denoising_matching
from efficient_detr.structures import (
    DecoderOutput,
    DenoisingGroups,
    DetectorOutput,
    SetPrediction,
    Targets,
)
from tests.tiny_models import empty_tokens, logit, targets_of

BOX = [0.5, 0.5, 0.2, 0.2]
MEMORY = empty_tokens([(1, 1)])  # which the loss does not read


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
        decoder=decoder_output(logits[None], boxes[None]), memory=MEMORY, **fields
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
    expected = focal(0.1, False) + focal(0.3, False) + focal(0.8, True) + focal(0.4, False)
    for num_boxes in (1.0, 2.5):
        loss = FocalClassLoss()(logits, matching, targets_of([BOX], labels=[[0]]), num_boxes)
        assert loss.item() == pytest.approx(expected / num_boxes, rel=1e-5)


def test_focal_class_loss_follows_the_matched_box() -> None:
    """Box 1 (class 0), not box 0 (class 1), belongs to query 0."""
    logits = torch.tensor([[[logit(0.6), logit(0.2)]]])
    matching = [(torch.tensor([0]), torch.tensor([1]))]
    loss = FocalClassLoss()(logits, matching, targets_of([BOX, BOX], labels=[[1, 0]]), 1.0)
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
        memory=MEMORY,
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
        memory=MEMORY,
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


def no_matches(images: int) -> list[tuple[Tensor, Tensor]]:
    empty = torch.zeros(0, dtype=torch.int64)
    return [(empty, empty)] * images


def test_softmax_class_loss() -> None:
    """Three queries with odds for two classes and "no object"; query 2 has the box of class 1.

    Query 0: 1 : 1 : 2, so -log(1/2) as background. Query 1: 3 : 4 : 1, -log(1/8). Query 2:
    1 : 6 : 1, -log(3/4). Background counts 0.1: the mean is over 0.1 + 0.1 + 1.
    """
    odds = [[1.0, 1, 2], [3, 4, 1], [1, 6, 1]]
    logits = torch.tensor([odds]).log()
    matching = [(torch.tensor([2]), torch.tensor([0]))]
    targets = targets_of([BOX], labels=[[1]])
    expected = (0.1 * math.log(2) + 0.1 * math.log(8) + math.log(4 / 3)) / 1.2
    for num_boxes in (1.0, 7.0):  # which do not normalise this loss
        loss = SoftmaxClassLoss()(logits, matching, targets, num_boxes)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    even = SoftmaxClassLoss(no_object_weight=1.0)(logits, matching, targets, 1.0)
    assert even.item() == pytest.approx((math.log(2) + math.log(8) + math.log(4 / 3)) / 3)


def test_softmax_class_loss_follows_the_matched_box() -> None:
    """Box 1 (class 0), not box 0 (class 1), belongs to the query."""
    logits = torch.tensor([[[1.0, 2, 1]]]).log()
    matching = [(torch.tensor([0]), torch.tensor([1]))]
    loss = SoftmaxClassLoss()(logits, matching, targets_of([BOX, BOX], labels=[[1, 0]]), 1.0)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-5)


def test_softmax_class_loss_is_one_mean_over_the_batch() -> None:
    """Image 1 has no box: its query weighs 0.1 beside the 1 of image 0, not a mean of its own."""
    logits = torch.tensor([[[1.0, 1]], [[3, 1]]]).log()
    targets = targets_of([BOX], [], labels=[[0], []])
    matching = [(torch.tensor([0]), torch.tensor([0])), no_matches(1)[0]]
    loss = SoftmaxClassLoss()(logits, matching, targets, 1.0)
    assert loss.item() == pytest.approx((math.log(2) + 0.1 * math.log(4)) / 1.1, rel=1e-5)


def test_softmax_class_loss_without_any_box() -> None:
    """All weights are 0.1, which cancels in the mean."""
    logits = torch.tensor([[[1.0, 1]], [[3, 1]]]).log().requires_grad_()
    loss = SoftmaxClassLoss()(logits, no_matches(2), targets_of([], []), 1.0)
    assert loss.item() == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-5)
    loss.backward()
    assert logits.grad is not None and (logits.grad != 0).all()


def test_softmax_class_loss_of_no_queries() -> None:
    """Denoising in a batch without boxes has no queries: a loss of zero, with a gradient."""
    logits = torch.zeros(2, 0, 4, requires_grad=True)
    loss = SoftmaxClassLoss()(logits, no_matches(2), targets_of([], []), 1.0)
    assert loss.item() == 0 and loss.requires_grad


def softmax_set_loss() -> SetLoss:
    return SetLoss(
        matcher=HungarianMatcher(class_cost=SoftmaxClassCost(), class_weight=1.0),
        class_loss=SoftmaxClassLoss(),
    )


def test_softmax_terms() -> None:
    """One query on the box, one far away; the first is half sure, the second of nothing sure.

    Classes: (log 2 + 0.1 log 3) / 1.1. The box is exact.
    """
    logits = torch.tensor([[[2.0, 1, 1], [1, 1, 1]]]).log()
    boxes = torch.tensor([[BOX, [0.9, 0.9, 0.1, 0.1]]])
    losses = softmax_set_loss()(output_of(logits, boxes), targets_of([BOX], labels=[[0]]))
    expected = (math.log(2) + 0.1 * math.log(3)) / 1.1
    assert losses["loss_class"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss_bbox"].item() == pytest.approx(0, abs=1e-6)
    assert losses["loss_giou"].item() == pytest.approx(0, abs=1e-6)


def test_softmax_set_loss_without_any_box() -> None:
    """DETR learns background from such a batch; the terms of boxes are zero."""
    output = empty_output()
    losses = softmax_set_loss()(output, targets_of([], []))
    for name, value in losses.items():
        assert value.isfinite() and value.requires_grad, name
    assert losses["loss_class"].item() > 0
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0


def two_labels(class_agnostic: bool) -> tuple[DetectorOutput, list[Targets]]:
    """Two proposals on two boxes of classes 2 and 1; only the first class is sure of them."""
    boxes = torch.tensor([[BOX, [0.2, 0.2, 0.1, 0.1]]])
    logits = torch.tensor([[[logit(0.9), logit(0.2), logit(0.3)]] * 2])
    output = output_of(
        torch.zeros(1, 2, 3),
        boxes,
        proposal=SetPrediction(logits, boxes, class_agnostic=class_agnostic),
    )
    return output, targets_of(boxes[0].tolist(), labels=[[2, 1]])


def test_class_agnostic_proposals_are_all_of_class_0() -> None:
    """Per proposal: 0.9 positive, 0.2 and 0.3 negative; two boxes normalise."""
    output, targets = two_labels(class_agnostic=True)
    losses = set_loss()(output, targets)
    expected = focal(0.9, True) + focal(0.2, False) + focal(0.3, False)
    assert losses["loss_class_enc"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss_bbox_enc"].item() == pytest.approx(0, abs=1e-6)
    # The decoder still learns the classes, and the targets are left as they are.
    assert losses["loss_class"].item() == pytest.approx(
        focal(0.5, True) + 2 * focal(0.5, False), rel=1e-5
    )
    assert targets[0].labels.tolist() == [2, 1]


def test_other_proposals_keep_their_classes() -> None:
    output, targets = two_labels(class_agnostic=False)
    losses = set_loss()(output, targets)
    both = 2 * focal(0.9, False)  # nothing is of class 0
    first = focal(0.2, False) + focal(0.3, True)
    second = focal(0.2, True) + focal(0.3, False)
    assert losses["loss_class_enc"].item() == pytest.approx((both + first + second) / 2, rel=1e-5)


def test_encoder_layers_are_matched_on_their_own() -> None:
    """Each predicts the box from another token; the suffix counts from the first layer."""
    first, second = [0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]
    layers = [
        SetPrediction(torch.zeros(1, 2, 1), torch.tensor([[first, second]])),
        SetPrediction(torch.full((1, 3, 1), logit(0.2)), torch.tensor([[second, second, first]])),
    ]
    output = output_of(
        torch.zeros(1, 2, 1),
        torch.tensor([[first, second]]),
        proposal=layers[0],
        encoder_layers=layers,
    )
    losses = set_loss()(output, targets_of([first], labels=[[0]]))
    assert losses.keys() == {
        f"loss_{term}{suffix}"
        for term in ("class", "bbox", "giou")
        for suffix in ("", "_enc", "_enc_0", "_enc_1")
    }
    for name, value in losses.items():
        if not name.startswith("loss_class"):
            assert value.item() == pytest.approx(0, abs=1e-6), name
    expected = focal(0.2, True) + 2 * focal(0.2, False)
    assert losses["loss_class_enc_1"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss_class_enc_0"].item() == losses["loss_class_enc"].item()
