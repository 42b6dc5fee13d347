"""Contrastive denoising: groups, slots, noise, mask."""

from __future__ import annotations

import pytest
import torch

from efficient_detr.boxes import cxcywh_to_xyxy, inverse_sigmoid
from efficient_detr.errors import ConfigError
from efficient_detr.modeling.queries import ContrastiveDenoising
from efficient_detr.modeling.queries.denoising import DenoisingNoise, denoising_mask
from efficient_detr.structures import DenoisingGroups, Queries, Targets
from tests.tiny_models import targets_of

BOX_A, BOX_B, BOX_C = [0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.1, 0.1], [0.7, 0.2, 0.3, 0.2]


def build(**changes: object) -> ContrastiveDenoising:
    return ContrastiveDenoising(**{"num_classes": 5, "channels": 4, **changes})  # type: ignore[arg-type]


def matching_queries(batch: int = 2, number: int = 3) -> Queries:
    return Queries(
        content=torch.randn(batch, number, 4), reference_boxes=torch.rand(batch, number, 4)
    )


def no_noise(targets: list[Targets], groups: DenoisingGroups) -> DenoisingNoise:
    repeated = 2 * groups.num_groups * sum(len(t.labels) for t in targets)
    return DenoisingNoise(
        label=torch.ones(repeated),
        new_labels=torch.zeros(0, dtype=torch.long),
        sign=torch.ones(repeated, 4),
        amount=torch.zeros(repeated, 4),
    )


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([2, 1], (50, 2)),  # 100 // 2
        ([3], (33, 3)),  # 100 // 3
        ([1], (100, 1)),
        ([150, 2], (1, 150)),  # at least one group
        ([0, 0], (100, 0)),  # no boxes: groups without slots
    ],
)
def test_layout(boxes: list[int], expected: tuple[int, int]) -> None:
    targets = targets_of(*[[BOX_A] * number for number in boxes])
    groups = build(num_queries=100).layout(targets)
    assert (groups.num_groups, groups.slots) == expected
    assert groups.num_queries == 2 * expected[0] * expected[1]


def test_slots() -> None:
    """Two groups of three slots; positives have no noise here, negatives are moved by (w, h) / 2.

    Order of an image with n boxes: n positives, padding up to 3, n negatives, padding; twice.
    """
    module = build(num_queries=6)
    targets = targets_of([BOX_A, BOX_B, BOX_C], [BOX_C], labels=[[4, 0, 2], [1]])
    module.draw_noise = no_noise  # type: ignore[method-assign]
    queries = module(matching_queries(), targets)
    assert queries.denoising == DenoisingGroups(num_groups=2, slots=3)
    embedding = module.label_embedding.weight
    empty = torch.zeros(4)
    block_a = [embedding[4], embedding[0], embedding[2]]
    block_b = [embedding[1], empty, empty]
    torch.testing.assert_close(queries.content[0, :12], torch.stack(block_a * 4))
    torch.testing.assert_close(queries.content[1, :12], torch.stack(block_b * 4))
    boxes = queries.reference_boxes[:, :12].unflatten(1, (2, 2, 3))  # (B, G, sign, M, 4)
    for group in range(2):
        torch.testing.assert_close(boxes[0, group, 0], torch.tensor([BOX_A, BOX_B, BOX_C]))
        # Every corner moves by half the size: the box slides by half its size. (0.7, 0.2, 0.3, 0.2)
        # would reach 0.7 + 0.15 + 0.15 = 1.0, just inside.
        moved = [[0.6, 0.7, 0.2, 0.4], [0.35, 0.65, 0.1, 0.1], [0.85, 0.3, 0.3, 0.2]]
        torch.testing.assert_close(boxes[0, group, 1], torch.tensor(moved))
        torch.testing.assert_close(boxes[1, group, 0, 0], torch.tensor(BOX_C))
        # An empty slot has logit zero, a box in the middle.
        assert boxes[1, group, :, 1:].eq(0.5).all()


def test_matching_queries_follow_unchanged() -> None:
    module, matching = build(num_queries=6), matching_queries()
    queries = module(matching, targets_of([BOX_A], [BOX_B]))
    assert queries.content.shape == (2, 12 + 3, 4)
    assert torch.equal(queries.content[:, 12:], matching.content)
    assert torch.equal(queries.reference_boxes[:, 12:], matching.reference_boxes)
    assert not queries.reference_boxes.requires_grad


def test_corners_are_clamped_to_the_image() -> None:
    """A box at the corner, its low corner pushed out by one half size: only half of it is left.

    Low corner 0.0 - 0.1 -> 0, high corner 0.2 + 0: the box stays; the logit is bounded at 1e-3.
    """
    module = build(num_queries=1)
    targets = targets_of([[0.1, 0.1, 0.2, 0.2]])
    groups = module.layout(targets)
    noise = no_noise(targets, groups)
    noise.sign[:, :2] = -1
    noise.amount[0] = torch.tensor([0.999, 0.999, 0, 0])
    _, logits = module.noised(targets, groups, noise)
    torch.testing.assert_close(logits[0, 0].sigmoid(), torch.tensor([0.1, 0.1, 0.2, 0.2]))
    # The negative: low corner 0 - 0.1 -> 0, high corner 0.2 + 0.1 = 0.3.
    torch.testing.assert_close(logits[1, 0].sigmoid(), torch.tensor([0.15, 0.15, 0.3, 0.3]))


def test_box_noise_statistics() -> None:
    """Positive corners move by less than half a size, evenly; negative ones by half to a whole.

    Where the low corner moves up and the high one down, those of a negative box cross. As
    published, its size is then the smallest that a logit holds; such axes are left out here.
    """
    module = build(num_queries=4000)
    box = torch.tensor([0.5, 0.5, 0.1, 0.2])
    targets = targets_of([box.tolist()])
    groups = module.layout(targets)
    noise = module.draw_noise(targets, groups)
    _, logits = module.noised(targets, groups, noise)
    boxes = logits.sigmoid().squeeze(1).unflatten(0, (-1, 2))  # (G, 2, 4)
    sign = noise.sign.unflatten(0, (-1, 2))
    inward = (sign[..., :2] > 0) & (sign[..., 2:] < 0)
    assert inward.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(
        boxes[:, 1, 2:][inward[:, 1]],
        torch.tensor(1e-3).expand(int(inward[:, 1].sum())),
        rtol=2e-3,
        atol=0,
    )
    shift = (cxcywh_to_xyxy(boxes) - cxcywh_to_xyxy(box)) / (box[2:].repeat(2) / 2)
    positive, negative = (shift[:, i][~inward[:, i].repeat(1, 2)] for i in range(2))
    tolerance = 1e-4  # of the way through the logit and back
    assert positive.abs().max() <= 1 + tolerance
    assert negative.abs().min() >= 1 - tolerance
    assert negative.abs().max() <= 2 + tolerance
    # Means of thousands of draws, within 5 standard deviations.
    assert positive.abs().mean().item() == pytest.approx(0.5, abs=0.012)
    assert negative.abs().mean().item() == pytest.approx(1.5, abs=0.012)
    assert positive.sign().mean().item() == pytest.approx(0.0, abs=0.04)


def test_noise_scale() -> None:
    targets = targets_of([BOX_A])
    for scale in (0.0, 0.4):
        module = build(num_queries=200, box_noise_scale=scale)
        groups = module.layout(targets)
        _, logits = module.noised(targets, groups, module.draw_noise(targets, groups))
        corners = cxcywh_to_xyxy(logits.sigmoid()) - cxcywh_to_xyxy(torch.tensor(BOX_A))
        reach = (corners / torch.tensor([0.1, 0.2, 0.1, 0.2])).abs().max().item()
        assert reach == pytest.approx(2 * scale, abs=0.02)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_label_noise_statistics(ratio: float) -> None:
    """Half the ratio is replaced by a uniform class, of which 1 in 5 is the old one."""
    module = build(num_queries=10_000, label_noise_ratio=ratio)
    targets = targets_of([BOX_A], labels=[[3]])
    groups = module.layout(targets)
    labels, _ = module.noised(targets, groups, module.draw_noise(targets, groups))
    changed = (labels != 3).float().mean().item()
    assert changed == pytest.approx(ratio / 2 * 4 / 5, abs=0.02)
    assert labels.min() >= 0 and labels.max() < 5


def test_labels_of_replayed_noise() -> None:
    """The first and last draw are below 0.5 / 2: their labels are replaced, in order."""
    module = build(num_queries=2)
    targets = targets_of([BOX_A, BOX_B], labels=[[4, 1]])
    groups = module.layout(targets)
    noise = DenoisingNoise(
        label=torch.tensor([0.1, 0.3, 0.25, 0.2]),
        new_labels=torch.tensor([0, 2]),
        sign=torch.ones(4, 4),
        amount=torch.zeros(4, 4),
    )
    labels, _ = module.noised(targets, groups, noise)
    assert labels.tolist() == [[0, 1], [4, 2]]


def test_mask() -> None:
    """Two groups of one positive and one negative slot, then two matching queries.

    Rows look at columns; x is blocked. Matching queries see each other only.
    """
    mask = denoising_mask(DenoisingGroups(num_groups=2, slots=1), torch.zeros(1, 2, 4))
    expected = [
        "..xx..",
        "..xx..",
        "xx....",
        "xx....",
        "xxxx..",
        "xxxx..",
    ]
    assert mask.tolist() == [[cell == "x" for cell in row] for row in expected]


def test_batch_without_boxes() -> None:
    """No denoising queries, but the label embedding has its (zero) gradient."""
    module, matching = build(), matching_queries()
    queries = module(matching, targets_of([], []))
    assert queries.denoising is not None
    assert queries.denoising.num_queries == 0
    torch.testing.assert_close(queries.content, matching.content)
    assert queries.attention_mask is not None
    assert not queries.attention_mask.any()
    queries.content.sum().backward()
    assert module.label_embedding.weight.grad is not None
    assert module.label_embedding.weight.grad.eq(0).all()


def test_one_image_without_boxes() -> None:
    module = build(num_queries=2)
    queries = module(matching_queries(), targets_of([], [BOX_A]))
    count = queries.denoising.num_queries if queries.denoising else 0
    assert count == 4
    assert queries.content[0, :count].eq(0).all()
    assert queries.content[1, :count].abs().sum(-1).gt(0).all()


def test_noise_is_determined_by_the_seed() -> None:
    module, matching, targets = build(), matching_queries(1), targets_of([BOX_A])
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(module(matching, targets).reference_boxes)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_labels_and_boxes_are_not_changed_in_place() -> None:
    targets = targets_of([BOX_A, BOX_B])
    before = targets[0].boxes.clone(), targets[0].labels.clone()
    build()(matching_queries(1), targets)
    assert torch.equal(targets[0].boxes, before[0])
    assert torch.equal(targets[0].labels, before[1])
    assert inverse_sigmoid(targets[0].boxes).isfinite().all()


def test_queries_without_boxes() -> None:
    queries = Queries(torch.zeros(1, 3, 4), position=torch.zeros(1, 3, 4))
    with pytest.raises(ConfigError, match="denoising needs queries with reference boxes: use two"):
        build()(queries, targets_of([BOX_A]))
