"""Foreground labels of both rules, worked out by hand, and the loss over them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.losses import BoxSizeForeground, ForegroundLoss, SideDistanceForeground
from efficient_detr.losses.foreground import side_distances
from efficient_detr.structures import (
    DecoderOutput,
    DetectorOutput,
    SpatialShapes,
    Targets,
    TokenSelection,
)
from tests.tiny_models import empty_tokens, logit

SIZE = (256, 512)  # powers of two, so that pixels survive the normalisation
SHAPES = [(32, 64), (16, 32), (8, 16), (4, 8)]


def target(*boxes: tuple[float, float, float, float], size: tuple[int, int] = SIZE) -> Targets:
    """Boxes (x0, y0, x1, y1) in pixels of an image of 256 x 512 unless another size is given."""
    corners = torch.tensor(boxes).reshape(-1, 4)
    scale = torch.tensor([size[1], size[0]])
    center = (corners[:, :2] + corners[:, 2:]) / 2 / scale
    extent = (corners[:, 2:] - corners[:, :2]) / scale
    labels = torch.zeros(len(corners), dtype=torch.long)
    return Targets(labels, torch.cat([center, extent], dim=1), size)


def cells(labels: Tensor, shape: tuple[int, int]) -> set[tuple[int, int]]:
    """(row, column) of the foreground tokens of a level."""
    return {(row, column) for row, column in labels.unflatten(0, shape).nonzero().tolist()}


def block(rows: range, columns: range) -> set[tuple[int, int]]:
    return {(row, column) for row in rows for column in columns}


def test_distances_to_the_sides() -> None:
    """Tokens of stride 8 sit at 4, 12, 20, ...; order left, top, right, bottom."""
    distances = side_distances((2, 3), 8, target((10, 2, 40, 14)))
    assert distances.shape == (6, 1, 4)
    assert distances[0, 0].tolist() == [-6, 2, 36, 10]  # at (4, 4)
    assert distances[5, 0].tolist() == [10, 10, 20, 2]  # at (20, 12)


def test_odd_strides_round_the_centre_down() -> None:
    """Stride 5: tokens at 2, 7, 12."""
    distances = side_distances((1, 3), 5, target((0, 0, 64, 64)))
    assert distances[:, 0, 0].tolist() == [2, 7, 12]


def test_sides_are_exclusive() -> None:
    """Level 0 of stride 8: a box from 4 to 20 holds the tokens 4, 12 and 20, of which 4 and 20 lie
    on its sides.
    """
    rule = SideDistanceForeground()
    assert cells(rule(SHAPES, target((4, 4, 20, 20)))[0], SHAPES[0]) == {(1, 1)}
    assert cells(rule(SHAPES, target((3, 3, 21, 21)))[0], SHAPES[0]) == block(range(3), range(3))


def test_the_largest_side_distance_chooses_the_level() -> None:
    """A box from (0, 0) to (100, 20): tokens of one box fall into two levels.

    Level 0 (up to and including 64): columns with max(x, 100 - x) <= 64, that is 36 <= x <= 64:
    x = 36, 44, 52, 60, columns 4 to 7, rows y = 4 and 12.
    Level 1 (above 64, up to 128), tokens at 8, 24, 40, ...: x = 8, 24, 72, 88 have 92, 76, 72, 88;
    row y = 8 only (24 is outside). Levels 2 and 3 get nothing.
    """
    labels = SideDistanceForeground()(SHAPES, target((0, 0, 100, 20)))
    assert cells(labels[0], SHAPES[0]) == block(range(2), range(4, 8))
    assert cells(labels[1], SHAPES[1]) == {(0, 0), (0, 1), (0, 4), (0, 5)}
    assert not labels[2].any() and not labels[3].any()


def test_range_ends_are_inclusive_and_begins_exclusive() -> None:
    """Boxes around one token, whose farthest side is exactly as far as a range ends.

    On level 0, the token at (100, 100): left side at 36 is 64 away, at 35.75 it is too far.
    On level 1, the token at (104, 104): 64 belongs to level 0, 64.25 and 128 to level 1.
    """
    rule = SideDistanceForeground()

    def token(level: int, row: int, column: int, *box: float) -> bool:
        labels = rule(SHAPES, target(box))[level]  # type: ignore[arg-type]
        return (row, column) in cells(labels, SHAPES[level])

    assert token(0, 12, 12, 36, 90, 110, 110)
    assert not token(0, 12, 12, 35.75, 90, 110, 110)
    assert not token(1, 6, 6, 40, 90, 110, 110)
    assert token(1, 6, 6, 39.75, 90, 110, 110)
    assert token(1, 6, 6, 90, 90, 232, 110)
    assert not token(1, 6, 6, 90, 90, 232.25, 110)
    # Level 2, token at (112, 112) of stride 32: 128 is level 1's, 128.25 its own.
    assert not token(2, 3, 3, 100, 100, 240, 120)
    assert token(2, 3, 3, 100, 100, 240.25, 120)
    # Level 3, token at (96, 96): from above 256, without an end.
    assert not token(3, 1, 1, 90, 90, 352, 100)
    assert token(3, 1, 1, 90, 90, 352.25, 100)
    assert token(3, 1, 1, 90, 90, 512, 100)


def test_overlapping_boxes_are_united() -> None:
    rule = SideDistanceForeground()
    both = rule(SHAPES, target((0, 0, 60, 60), (30, 30, 90, 90)))
    first, second = rule(SHAPES, target((0, 0, 60, 60))), rule(SHAPES, target((30, 30, 90, 90)))
    for united, one, other in zip(both, first, second, strict=True):
        assert torch.equal(united, one | other)


def test_a_smaller_image_of_a_padded_batch() -> None:
    """Boxes are normalised to the image, not to the batch: the token grid is that of the batch."""
    small = target((8, 8, 32, 24), size=(32, 64))
    labels = SideDistanceForeground()(SHAPES, small)[0]
    assert cells(labels, SHAPES[0]) == block(range(1, 3), range(1, 4))


@pytest.mark.parametrize("rule", [SideDistanceForeground(), BoxSizeForeground()])
def test_no_boxes_no_foreground(rule: SideDistanceForeground | BoxSizeForeground) -> None:
    labels = rule(SHAPES, target())
    assert [tuple(level.shape) for level in labels] == [(h * w,) for h, w in SHAPES]
    assert not any(level.any() for level in labels)


def test_paper_ranges_overlap_by_half() -> None:
    """Each range begins in the middle of the one before: 0, (0+64)/2, (32+128)/2, (80+256)/2."""
    assert BoxSizeForeground().ranges == [(0, 64), (32, 128), (80, 256), (168, math.inf)]


@pytest.mark.parametrize(
    ("side", "levels"),
    [
        (60, [0]),  # half 30
        (64, [0, 1]),  # half 32, where level 1 begins
        (128, [0, 1]),  # half 64, where level 0 ends
        (130, [1]),
        (160, [1, 2]),  # half 80
        (256, [1, 2]),  # half 128
        (336, [2, 3]),  # half 168
        (512, [2, 3]),  # half 256
    ],
)
def test_paper_levels_go_by_half_the_longer_side(side: int, levels: list[int]) -> None:
    """All tokens strictly inside a flat box at the left border, on the levels of its size."""
    labels = BoxSizeForeground()(SHAPES, target((0, 0, side, 40)))
    assert [level for level in range(4) if labels[level].any()] == levels
    for level in levels:
        stride = 8 * 2**level
        inside = block(
            range(math.ceil((40 - stride // 2) / stride)),
            range(math.ceil((side - stride // 2) / stride)),
        )
        assert cells(labels[level], SHAPES[level]) == inside


def test_paper_levels_go_by_the_longer_side_of_a_tall_box_too() -> None:
    labels = BoxSizeForeground()(SHAPES, target((0, 0, 20, 130)))
    assert not labels[0].any() and labels[1].any()


def test_the_two_rules_differ_inside_a_box() -> None:
    """A box of 100 x 20 has half the longer side 50: levels 0 and 1 for all of its tokens."""
    box = target((0, 0, 100, 20))
    paper, code = BoxSizeForeground()(SHAPES, box), SideDistanceForeground()(SHAPES, box)
    assert cells(paper[0], SHAPES[0]) == block(range(2), range(12))
    assert cells(code[0], SHAPES[0]) == block(range(2), range(4, 8))


def output_with(level_logits: list[Tensor], shapes: SpatialShapes) -> DetectorOutput:
    empty = torch.zeros(1, len(level_logits[0]), 0, 4)
    selection = TokenSelection([], torch.zeros(0), torch.zeros(0), level_logits)
    memory = empty_tokens(shapes, batch=len(level_logits[0]))
    return DetectorOutput(DecoderOutput(empty, empty, empty), memory, selection=selection)


def focal(probability: float, positive: bool) -> float:
    p, alpha = (probability, 0.25) if positive else (1 - probability, 0.75)
    return -alpha * (1 - p) ** 2 * math.log(p)


def test_loss() -> None:
    """Level 0 of 1 x 3 tokens at 4, 12, 20 and level 1 of one token at 8.

    Image 0 has a box around the token at 12 (its own level's only); image 1 has none. Probabilities
    0.9, 0.2, 0.9 and 0.4 in both.
    """
    rule = SideDistanceForeground(strides=[8, 16], ends=[64])
    level_logits = [
        torch.tensor([[logit(0.9), logit(0.2), logit(0.9)]] * 2),
        torch.tensor([[logit(0.4)]] * 2),
    ]
    output = output_with(level_logits, [(1, 3), (1, 1)])
    targets = [target((9, 0, 15, 8)), target()]
    losses = ForegroundLoss(labels=rule, weight=1.5)(output, targets)
    rest = 2 * focal(0.9, False) + focal(0.4, False)
    first = rest + focal(0.2, True)  # one positive token
    second = rest + focal(0.2, False)  # none: divided by 1
    assert losses.keys() == {"loss_foreground"}
    assert losses["loss_foreground"].item() == pytest.approx(1.5 * (first + second) / 2, rel=1e-5)


def test_loss_is_divided_by_the_positive_tokens_of_each_image() -> None:
    """Three positives with p = 1/2 cost as much as one."""
    rule = SideDistanceForeground(strides=[8], ends=[])
    loss = ForegroundLoss(labels=rule, weight=1.0)
    three = loss(output_with([torch.zeros(1, 3)], [(1, 3)]), [target((0, 0, 24, 8))])
    assert three["loss_foreground"].item() == pytest.approx(focal(0.5, True), rel=1e-5)


def test_saturated_scores_keep_the_loss_finite() -> None:
    """The published loss is infinite where a positive token's probability rounds to 0."""
    rule = SideDistanceForeground(strides=[8], ends=[])
    logits = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    loss = ForegroundLoss(labels=rule)(output_with([logits], [(1, 2)]), [target((1, 1, 7, 7))])
    assert loss["loss_foreground"].isfinite()
    loss["loss_foreground"].backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_wrong_set_up() -> None:
    for rule in (SideDistanceForeground, BoxSizeForeground):
        with pytest.raises(ConfigError, match="4 strides need 3 range ends, not 2"):
            rule(ends=[64, 128])
        with pytest.raises(ConfigError, match=r"the detector has 3 levels, .* 4 strides"):
            rule()(SHAPES[:3], target())
    loss = ForegroundLoss(labels=SideDistanceForeground())
    empty = torch.zeros(1, 1, 0, 4)
    output = DetectorOutput(DecoderOutput(empty, empty, empty), empty_tokens(SHAPES))
    with pytest.raises(ConfigError, match="remove the loss from model.losses or add a selection"):
        loss(output, [target()])
