"""The conversion of one file of a known format for one model, or for none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from efficient_detr.checkpoint.backbones import resize_tables
from efficient_detr.checkpoint.classes import (
    COCO_CLASSES,
    COCO_IDS,
    RowSelection,
    background_rows,
    coco_class_names,
    select_rows,
    take_rows,
)
from efficient_detr.checkpoint.conversion import ReadState, read_keys
from efficient_detr.checkpoint.formats import OWN_FORMAT
from efficient_detr.checkpoint.layout import CheckpointFormat, ClassRows, Shape
from efficient_detr.checkpoint.report import ConversionReport
from efficient_detr.errors import UserError

# Weights with a row for each query.
_QUERIES = tuple(f"detector.queries.{name}" for name in ("position", "embedding", "content"))
CLASS_LAYER = ".class_layer."
# Of batches, by norms that are trained.
_COUNTER = ".num_batches_tracked"
_PARTIAL = "take what fits with --allow-partial or train.allow_partial_checkpoint=True"

# What is said of weights that do not fit, of several and of one.
_COPIES = "should be copies", "should be a copy"
_UNKNOWN = "are not of this format", "is not of this format"
_PARTS = "lack their other parts", "lacks its other parts"
_NO_PLACE = "have no place there", "has no place there"
_SHAPE = "have another shape there", "has another shape there"
_OTHER_QUERIES = "have another number of queries", "has another number of queries"
_OTHER_CLASSES = "have rows of other classes", "has rows of other classes"

# What a table may do with keys that it was not made for.
_TABLE_ERRORS = (LookupError, ValueError, RuntimeError)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Conversion:
    """A checkpoint under our names.

    Attributes:
        state: our name -> tensor, in the shapes of the model if there is one.
        report: what became of every weight.
        format: of the file; None if only its backbone is known.
        class_names: of the classes in `state`, in order; None if unknown.
    """

    state: dict[str, Tensor]
    report: ConversionReport
    format: CheckpointFormat | None
    class_names: tuple[str, ...] | None = None


class DetectorConverter:
    """One conversion of a file of a known format; arguments as of `convert_checkpoint`.

    Args:
        layout: the format.
        model: what the weights are for, None if unknown.
        class_names: of the model's classes.
        source_class_names: of the file's classes.
        fresh_heads: whether weights that depend on the number of classes or queries may stay
            initial.
        allow_partial: whether any weight may.
        keep_classes: whether rows of classes stay as they are where there is no model.
        source: the file, for errors.
        target: the model, for errors.
    """

    def __init__(
        self,
        layout: CheckpointFormat,
        model: nn.Module | None,
        *,
        class_names: Sequence[str] | None,
        source_class_names: Sequence[str] | None,
        fresh_heads: bool,
        allow_partial: bool,
        keep_classes: bool,
        source: str,
        target: str,
    ) -> None:
        self._layout = layout
        self._model = model
        self._class_names = class_names
        self._source_class_names = source_class_names
        self._trains = fresh_heads
        self._fresh_heads = fresh_heads or allow_partial
        self._allow_partial = allow_partial
        self._keep_classes = keep_classes
        self._source = f"{source} ({layout.title})"
        self._target = target
        self._initial: dict[str, Tensor] = {} if model is None else dict(model.state_dict())
        self._state: dict[str, Tensor] = {}
        self._report = ConversionReport(layout.title, "")
        # Our names that stay initial because the model has other classes or queries.
        self._fresh: set[str] = set()
        # Our names for which the file has something that does not fit.
        self._refused: set[str] = set()
        # What does not fit: what is said of many keys -> an example for each.
        self._misfits: dict[tuple[str, str], list[str]] = {}
        self._selects_coco = False
        # What would make the model fit.
        self._advice: list[str] = []

    def convert(self, weights: Mapping[str, Tensor]) -> Conversion:
        """Convert the weights of a file.

        Raises:
            UserError: if they do not fit.
        """
        shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
        read = understood(
            lambda: read_keys(weights, self._layout.read_table(shapes), self._initial),
            f"{self._source} cannot be converted",
        )
        self._note_leftovers(read, weights)
        ours = {name: tuple(tensor.shape) for name, tensor in read.state.items()}
        resized = {} if self._model is None else resize_tables(read.state, self._model)
        for name, tensor in read.state.items():
            keys = read.sources[name]
            missing = self._model is not None and name not in self._initial
            if missing and name.endswith(_COUNTER):
                self._report.dropped.update(dict.fromkeys(keys, "counts that frozen norms lack"))
            elif missing:
                self._refuse(keys, "no place in the model", _NO_PLACE, keys[0])
            elif (rule := self._layout.class_rule(name, ours)) is not None:
                self._place_classes(rule, name, tensor, keys)
            elif name in resized:
                self._state[name] = resized[name]
                self._report.resized[name] = (shapes[keys[0]], tuple(resized[name].shape))
            else:
                self._place(name, tensor, keys, shapes[keys[0]])
        self._report.initial = [name for name in self._initial if name not in self._state]
        self._check()
        return Conversion(self._state, self._report, self._layout, self._names())

    def _note_leftovers(self, read: ReadState, weights: Mapping[str, Tensor]) -> None:
        """Keys that are not behind one of our names."""
        self._report.dropped.update(read.dropped)
        used = {key for keys in read.sources.values() for key in keys}
        for key in weights:
            if key in read.different:
                del self._report.dropped[key]
                self._refuse([key], "not the copy that it should be", _COPIES, key)
            elif key in read.unknown:
                self._refuse([key], "not of this format", _UNKNOWN, key)
            elif key not in used and key not in read.dropped:
                self._refuse([key], "other parts are missing", _PARTS, key)

    def _place(self, name: str, tensor: Tensor, keys: Sequence[str], stored: Shape) -> None:
        """Take a weight without classes, if it has the shape that the model wants."""
        if self._model is not None and tensor.shape != self._initial[name].shape:
            shape, wanted = tuple(tensor.shape), tuple(self._initial[name].shape)
            other_queries = name in _QUERIES and shape[1:] == wanted[1:]
            if self._fresh_heads and other_queries:
                self._leave_fresh(name, keys, f"{shape[0]} queries instead of {wanted[0]}")
                return
            self._refused.add(name)
            text = f"{_shape(shape)} instead of {_shape(wanted)}"
            kind = _OTHER_QUERIES if other_queries else _SHAPE
            if other_queries:
                self._advise(f"set model.detector.queries.num_queries={shape[0]}")
            self._refuse(keys, text, kind, f"{keys[0]}: {text}")
            return
        self._state[name] = tensor
        self._note_taken(name, tensor, keys, stored)

    def _note_taken(self, name: str, tensor: Tensor, keys: Sequence[str], stored: Shape) -> None:
        if len(keys) > 1:
            self._report.packed[name] = tuple(keys)
        elif tuple(tensor.shape) != stored:
            self._report.reshaped[name] = stored, tuple(tensor.shape)
        elif keys[0] != name:
            self._report.renamed[name] = keys[0]
        else:
            self._report.matched.append(name)

    def _place_classes(
        self, rule: ClassRows, name: str, tensor: Tensor, keys: Sequence[str]
    ) -> None:
        """Take the rows of a weight that belong to the classes of the model."""
        stored = tuple(tensor.shape)
        initial = self._initial.get(name)
        if not stored or (initial is not None and initial.shape[1:] != stored[1:]):
            self._place(name, tensor, keys, stored)
            return
        # A model may have as many classes as there are rows, used or not.
        keeps_all = initial is not None and len(initial) == len(tensor)
        theirs = len(tensor) - (0 if keeps_all else rule.unused)
        background = self._background(name, theirs)
        target = self._rows(theirs, background) if initial is None else len(initial)
        selection = select_rows(
            theirs,
            target,
            background=background,
            in_order=rule.in_order,
            source_names=self._source_class_names,
            target_names=self._class_names,
            allow_missing=self._fresh_heads,
            new_classes=self._trains,
        )
        if not selection.complete and not self._fresh_heads:
            self._refused.add(name)
            self._refuse_classes(
                keys[0], theirs - self._background_of_file(name, background), target - background
            )
        elif selection.found == 0 or (not selection.complete and _has_no_values(initial)):
            self._leave_fresh(name, keys, "rows of other classes")
        elif selection.rows == tuple(range(len(tensor))):
            self._state[name] = tensor
            self._note_taken(name, tensor, keys, stored)
        else:
            self._state[name] = take_rows(tensor, selection, initial)
            self._selects_coco |= selection.by_name and theirs - background == COCO_IDS
            self._report.class_rows[name] = _described(selection, len(tensor), rule.in_order)

    def _background(self, name: str, rows: int) -> int:
        """How many rows stand for "no object", in the file as in the model."""
        if CLASS_LAYER not in name:
            return 0
        if self._model is None:
            return background_rows(rows)
        head = self._model.get_submodule(name.partition(CLASS_LAYER)[0])
        return int(getattr(head, "background_classes", 0))

    def _background_of_file(self, name: str, of_model: int) -> int:
        """The same for the file; ours do not say so, and are taken for files of such a model."""
        if self._layout is OWN_FORMAT:
            return of_model
        return int(self._layout.no_object and CLASS_LAYER in name)

    def _rows(self, rows: int, background: int) -> int:
        """How many rows to make where there is no model that would say so."""
        if self._class_names is not None:
            return len(self._class_names) + background
        published = self._layout is not OWN_FORMAT and not self._keep_classes
        if rows - background == COCO_IDS and published:
            return COCO_CLASSES + background
        return rows

    def _names(self) -> tuple[str, ...] | None:
        """Names of the classes in the result."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        name = next((one for one in shapes if self._layout.class_rule(one, shapes)), None)
        if name is None:
            return None
        rows = len(self._state[name])
        count = rows - self._background(name, rows)
        if self._class_names is not None and len(self._class_names) == count:
            return tuple(self._class_names)
        if self._source_class_names is not None and len(self._source_class_names) == count:
            return tuple(self._source_class_names)
        # Only where 91 rows said that the classes are COCO's.
        return coco_class_names() if self._selects_coco and count == COCO_CLASSES else None

    # What does not fit ---------------------------------------------------------------------------

    def _leave_fresh(self, name: str, keys: Sequence[str], reason: str) -> None:
        self._fresh.add(name)
        self._report.dropped.update(dict.fromkeys(keys, reason))

    def _advise(self, advice: str) -> None:
        if advice not in self._advice:
            self._advice.append(advice)

    def _refuse(
        self, keys: Sequence[str], reason: str, kind: tuple[str, str], example: str
    ) -> None:
        self._report.unexpected.update(dict.fromkeys(keys, reason))
        self._misfits.setdefault(kind, []).append(example)

    def _refuse_classes(self, key: str, theirs: int, ours: int) -> None:
        text = f"{theirs} classes instead of {ours}"
        if theirs == ours:
            text = "not all of the model's classes"
        if self._class_names is not None and len(self._class_names) == ours:
            self._advise(
                "it was trained for other classes than those of the data set, so fine-tune it first"
            )
        elif theirs != ours:
            self._advise(f"set model.num_classes={theirs}")
        self._refuse([key], text, _OTHER_CLASSES, f"{key}: {text}")

    def _check(self) -> None:
        """Refuse what does not fit, in one sentence.

        Raises:
            UserError: if a key or a weight of the model is left over that should not.
        """
        excused = self._fresh | self._refused
        missing = [
            name
            for name in self._report.initial
            if name not in excused and not name.endswith(_COUNTER)
        ]
        problems = [
            f"{len(examples)} of its weights {kinds[len(examples) == 1]} ({_examples(examples)})"
            for kinds, examples in self._misfits.items()
        ]
        if missing:
            weights = f"{len(missing)} weight{'s' if len(missing) > 1 else ''}"
            problems.append(f"it has nothing for {weights} of the model ({_examples(missing)})")
        if not problems or (self._allow_partial and self._state):
            return
        advice = "choose the config that belongs to the file"
        if (
            self._advice
            and not missing
            and self._misfits.keys() <= {_OTHER_QUERIES, _OTHER_CLASSES}
        ):
            advice = " and ".join(self._advice)
        raise UserError(
            f"{self._source} does not fit {self._target}: {', '.join(problems)}; {advice}, "
            f"or {_PARTIAL}."
        )


def understood(action: Callable[[], _Result], problem: str) -> _Result:
    """The result of applying a table; errors become a sentence."""
    try:
        return action()
    except _TABLE_ERRORS as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise UserError(f"{problem}: {reason}.") from error


def _has_no_values(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.device.type == "meta"


def _described(selection: RowSelection, before: int, in_order: bool) -> str:
    after = len(selection.rows)
    if not selection.complete:
        how = " by name" if selection.by_name else ""
        return f"with {selection.found} of {after} rows carried over{how}, the others initial"
    if before == after:
        return f"{after} rows in another order"
    return f"from {before} to {after} rows{', the first ones' if in_order else ''}"


def _examples(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{texts[0]}, ..."


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a number"
