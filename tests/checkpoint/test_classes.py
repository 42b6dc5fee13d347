"""Rows of classes: COCO's two ways of numbering, names, and what is carried over."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficient_detr.checkpoint.classes import (
    NO_CLASS,
    RowSelection,
    assumed_class_names,
    background_rows,
    coco_class_names,
    coco_id_names,
    never_rows,
    select_rows,
    spread_to_coco_ids,
    take_rows,
)

# As in DETR's demo: what COCO calls N/A.
NEVER_GIVEN = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def test_coco_numbers_its_classes_with_gaps() -> None:
    names = coco_id_names()
    assert len(coco_class_names()) == 80 and len(names) == 91
    assert tuple(i for i, name in enumerate(names) if name == NO_CLASS) == NEVER_GIVEN
    assert (names[1], names[13], names[90]) == ("person", "stop sign", "toothbrush")
    assert tuple(name for name in names if name != NO_CLASS) == coco_class_names()


@pytest.mark.parametrize(
    ("rows", "background"), [(80, 0), (81, 1), (91, 0), (92, 1), (20, 0), (21, 0)]
)
def test_background_follows_the_classes_of_coco(rows: int, background: int) -> None:
    assert background_rows(rows) == background


def test_names_are_assumed_for_coco_alone() -> None:
    assert assumed_class_names(80) == coco_class_names()
    assert assumed_class_names(91) == coco_id_names()
    assert assumed_class_names(20) is None


@pytest.mark.parametrize("background", [0, 1])
def test_91_rows_become_80(background: int) -> None:
    selection = select_rows(91 + background, 80 + background, background=background)
    given = [number for number in range(91) if number not in NEVER_GIVEN]
    assert list(selection.rows) == given + [91] * background
    assert selection.complete and selection.by_name


def test_rows_that_are_read_in_order_are_not_remapped() -> None:
    assert select_rows(91, 80, in_order=True).rows == tuple(range(80))
    assert select_rows(80, 91, in_order=True).rows == (*range(80), *[None] * 11)


def test_equal_numbers_stay_in_order_without_names() -> None:
    assert select_rows(7, 7).rows == tuple(range(7))
    assert select_rows(91, 91).rows == tuple(range(91))
    assert select_rows(80, 80).rows == tuple(range(80))


def test_rows_follow_the_names() -> None:
    selection = select_rows(
        4, 3, background=1, source_names=["cat", "dog", "cow"], target_names=["dog", "cat"]
    )
    assert selection.rows == (1, 0, 3)
    assert selection == RowSelection((1, 0, 3), by_name=True)


def test_names_that_are_missing_stay_initial_where_that_is_allowed() -> None:
    names = dict(source_names=["cat", "dog"], target_names=["dog", "fox", "cat"])
    assert select_rows(2, 3, **names, allow_missing=True).rows == (1, None, 0)
    assert not select_rows(2, 3, **names).complete


def test_rows_of_equal_number_are_given_up_where_that_is_wanted() -> None:
    other = [f"own {number}" for number in range(80)]
    for count, names in ((2, {"source_names": ["a", "b"]}), (80, {})):
        wanted: Any = {**names, "target_names": other[:count], "new_classes": True}
        assert select_rows(count, count, **wanted).rows == (None,) * count
        assert select_rows(count, count, **{**wanted, "new_classes": False}).complete
    # Nothing says that these are others.
    assert select_rows(7, 7, target_names=other[:7], new_classes=True).complete


def test_a_part_of_the_names_decides_only_where_rows_may_be_missing() -> None:
    names = dict(source_names=["cat", "dog"], target_names=["dog", "fox"])
    assert select_rows(2, 2, **names, allow_missing=True).rows == (1, None)
    assert select_rows(2, 2, **names).rows == (0, 1)


def test_nothing_in_common() -> None:
    names = dict(source_names=["cat", "dog"], target_names=["ant", "bee"])
    assert select_rows(2, 2, **names, allow_missing=True).rows == (0, 1)
    others = select_rows(4, 3, background=1, source_names=["a", "b", "c"], target_names=["d", "e"])
    assert others.found == 0
    assert select_rows(5, 3, allow_missing=True).found == 0


def test_names_of_another_number_are_not_believed() -> None:
    selection = select_rows(91, 80, source_names=["cat"], target_names=["dog", "fox"])
    assert selection.rows == select_rows(91, 80).rows


def test_rows_without_a_class_match_nothing() -> None:
    names = dict(source_names=["", "cat"], target_names=["cat", "", "dog"])
    assert select_rows(2, 3, **names, allow_missing=True).rows == (1, None, None)


def test_taken_rows_keep_initial_values_elsewhere() -> None:
    theirs, initial = torch.arange(6.0).view(3, 2), -torch.ones(3, 2)
    taken = take_rows(theirs, RowSelection((2, None, 0)), initial)
    assert taken.tolist() == [[4, 5], [-1, -1], [0, 1]]
    assert initial.eq(-1).all() and theirs[0].tolist() == [0, 1]


@pytest.mark.parametrize("background", [0, 1])
def test_spread_rows_come_back(background: int) -> None:
    bias = torch.randn(80 + background)
    spread = spread_to_coco_ids("head.class_layer.bias", bias, background=background)
    assert len(spread) == 91 + background
    assert spread[list(NEVER_GIVEN)].eq(-20).all()
    selection = select_rows(len(spread), len(bias), background=background)
    assert torch.equal(take_rows(spread, selection, None), bias)


def test_rows_in_order_are_spread_in_order() -> None:
    weight = torch.randn(80, 3)
    spread = spread_to_coco_ids("head.class_layer.weight", weight, in_order=True)
    assert torch.equal(spread[:80], weight) and spread[80:].eq(0).all()


def test_classes_that_never_occur_have_no_probability() -> None:
    assert never_rows("a.class_layer.bias", torch.ones(2), 3).tolist() == [-20] * 3
    assert never_rows("a.class_layer.weight", torch.ones(2, 4), 1).tolist() == [[0] * 4]
    assert never_rows("denoising.label_embedding.weight", torch.ones(2, 2), 1).eq(0).all()
