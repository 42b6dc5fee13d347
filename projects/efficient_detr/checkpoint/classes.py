"""Rows of classes: which class each row of a head belongs to, and moving rows between data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from detectron2.data import MetadataCatalog
from torch import Tensor

_COCO = "coco_2017_val"
_NEVER_LOGIT = -20.0

COCO_CLASSES = 80
COCO_IDS = 91
NO_CLASS = ""
"""Stands for a row that belongs to no class."""


@cache
def coco_class_names() -> tuple[str, ...]:
    """Names of COCO's 80 classes, by the contiguous index that Detectron2 gives them."""
    return tuple(MetadataCatalog.get(_COCO).thing_classes)


@cache
def coco_id_names() -> tuple[str, ...]:
    """91 names by COCO's own category number; `NO_CLASS` for 0 and for numbers never given."""
    classes = coco_class_names()
    index_of = MetadataCatalog.get(_COCO).thing_dataset_id_to_contiguous_id
    return tuple(
        classes[index_of[number]] if number in index_of else NO_CLASS for number in range(COCO_IDS)
    )


def assumed_class_names(count: int) -> tuple[str, ...] | None:
    """The names that this number of rows suggests, None if it suggests none."""
    if count == COCO_IDS:
        return coco_id_names()
    return coco_class_names() if count == COCO_CLASSES else None


def background_rows(rows: int) -> int:
    """How many of the rows of a published head stand for "no object", going by their number."""
    return int(rows in (COCO_CLASSES + 1, COCO_IDS + 1))


@dataclass(frozen=True)
class RowSelection:
    """Where the rows of a weight of ours come from.

    Attributes:
        rows: for each row the row of the file, None if the file has none for it.
        by_name: whether the rows of classes were found by the names of the classes.
    """

    rows: tuple[int | None, ...]
    by_name: bool = False

    @property
    def complete(self) -> bool:
        """Whether the file has every row."""
        return None not in self.rows

    @property
    def found(self) -> int:
        """Number of rows that the file has."""
        return sum(row is not None for row in self.rows)


def select_rows(
    source: int,
    target: int,
    *,
    background: int = 0,
    in_order: bool = False,
    source_names: Sequence[str] | None = None,
    target_names: Sequence[str] | None = None,
    allow_missing: bool = False,
    new_classes: bool = False,
) -> RowSelection:
    """Find the rows of a file for the classes of a model.

    Args:
        source: number of rows of the file, background included.
        target: number of rows of the model, background included.
        background: rows after the classes that stand for "no object", in both.
        in_order: whether rows keep their numbers, whatever the classes.
        source_names: class names of the file; if they are not as many as its classes, those that
            their number suggests.
        target_names: class names of the model, likewise.
        allow_missing: whether rows without a counterpart are acceptable. If they are not, rows of
            equal number stay as they are instead of being carried over in part.
        new_classes: whether rows of equal number are given up as well where both name their
            classes and have none in common.

    Returns:
        The rows; none of them is found if the classes have nothing in common.
    """
    ours, theirs = target - background, source - background
    if in_order:
        return RowSelection(tuple(row if row < source else None for row in range(target)))
    wanted, given = _names(target_names, ours), _names(source_names, theirs)
    end = tuple(range(theirs, source))
    unchanged = RowSelection((*range(ours), *end)) if ours == theirs else None
    if wanted is None or given is None or wanted == given:
        return unchanged or RowSelection((None,) * target)
    row_of = {name: row for row, name in reversed(list(enumerate(given))) if name != NO_CLASS}
    rows = tuple(row_of.get(name) for name in wanted)
    found = sum(row is not None for row in rows)
    if found == ours or (found and (allow_missing or unchanged is None)):
        return RowSelection((*rows, *end), by_name=True)
    if new_classes and found == 0:
        unchanged = None
    return unchanged or RowSelection((None,) * target)


def _names(names: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    if names is not None and len(names) == count:
        return tuple(names)
    return assumed_class_names(count)


def take_rows(tensor: Tensor, selection: RowSelection, initial: Tensor | None) -> Tensor:
    """The selected rows of a weight of the file.

    Args:
        tensor: (rows of the file, ...).
        selection: of its rows.
        initial: (rows of the model, ...), what other rows stay at; None if there are none.

    Returns:
        (rows of the model, ...).
    """
    numbers = torch.tensor([row or 0 for row in selection.rows], device=tensor.device)
    taken = tensor[numbers]
    if initial is not None and not selection.complete:
        missing = torch.tensor([row is None for row in selection.rows])
        taken[missing] = initial.detach()[missing].to(taken)
    return taken


def never_rows(name: str, like: Tensor, count: int) -> Tensor:
    """Rows for classes that a model should never predict.

    Args:
        name: of the weight; the bias of a class layer gets logits far below zero.
        like: the weight (K, ...).
        count: number of rows.

    Returns:
        (count, ...), zero apart from biases.
    """
    value = _NEVER_LOGIT if name.endswith("class_layer.bias") else 0.0
    return like.new_full((count, *like.shape[1:]), value)


def spread_to_coco_ids(
    name: str, tensor: Tensor, *, background: int = 0, in_order: bool = False
) -> Tensor:
    """Put the rows of COCO's 80 classes at their 91 category numbers.

    Args:
        name: of the weight.
        tensor: (80 + background, ...).
        background: rows after the classes.
        in_order: whether the rows keep their numbers.

    Returns:
        (91 + background, ...); rows of numbers without a class are `never_rows`.
    """
    spread = never_rows(name, tensor, COCO_IDS + background)
    if in_order:
        spread[: len(tensor)] = tensor
        return spread
    numbers = [number for number, known in enumerate(coco_id_names()) if known != NO_CLASS]
    spread[numbers] = tensor[:COCO_CLASSES]
    spread[COCO_IDS:] = tensor[COCO_CLASSES:]
    return spread
