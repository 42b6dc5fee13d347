"""What became of every weight of a published checkpoint."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

Shape = tuple[int, ...]

_EXAMPLES = 3
_REASONS = 6
# With the three columns before, lines get as long as those of most terminals.
_DETAIL_WIDTH = 68


@dataclass
class ConversionReport:
    """What became of every weight of a checkpoint, and of every weight that it should fill.

    Each of our names is in one of `matched`, `renamed`, `packed`, `reshaped`, `resized`,
    `class_rows` and `initial`; each key of the file is behind one of the first six, or in `dropped`
    or `unexpected`.

    Attributes:
        layout: name of the published layout.
        target: path of the module that was filled, '' for the whole model.
        matched: our names of tensors taken as they are.
        renamed: our name -> name in the checkpoint, of tensors taken under another name.
        packed: our name -> names in the checkpoint of the tensors that were joined into ours.
        reshaped: our name -> shape in the checkpoint and in the model, with the same values.
        resized: our name -> shape in the checkpoint and in the model, interpolated.
        class_rows: our name -> which rows of classes were taken.
        dropped: name in the checkpoint -> why it has no place in the model.
        unexpected: name in the checkpoint -> why it does not fit, of those that should.
        initial: our names of weights of the target, and of the head of a classifier around it, that
            the checkpoint does not fill.
        random_head: whether the head of a classifier is among them.
        parts: names of the parts of the checkpoint outside the backbone, which are left out.
    """

    layout: str
    target: str
    matched: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    packed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reshaped: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    class_rows: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    initial: list[str] = field(default_factory=list)
    random_head: bool = False
    parts: list[str] = field(default_factory=list)

    @property
    def filled(self) -> int:
        """Number of weights of ours that got values."""
        return sum(filled for _, _, filled, _ in self._taken())

    @property
    def read(self) -> int:
        """Number of weights of the checkpoint."""
        taken = sum(read for _, read, _, _ in self._taken())
        return taken + len(self.dropped) + len(self.unexpected)

    def leave_out_parts(self, keys: Iterable[str], prefix: str) -> None:
        """Note keys outside the backbone, by the part of the other model that has them.

        Args:
            keys: names in the checkpoint.
            prefix: of the backbone's keys; parts are named as far as beside the backbone.
        """
        outer = prefix.removesuffix(".").rpartition(".")[0]
        outer = outer and f"{outer}."
        for key in keys:
            part = key.removeprefix(outer).partition(".")[0]
            self.dropped[key] = f"of {part}, outside the backbone"
            if part not in self.parts:
                self.parts.append(part)

    def table(self) -> str:
        """One row for each fate: weights of the checkpoint, weights of ours, and details.

        Lines are at most 120 characters long, unless a name is longer than its column.
        """
        rows: list[tuple[str, int | None, int | None, str]] = [*self._taken()]
        rows += [
            ("left out", len(self.dropped), None, _counted(self.dropped.values())),
            ("without a place", len(self.unexpected), None, _with_reasons(self.unexpected)),
            ("left at their initial values", None, len(self.initial), _examples(self.initial)),
        ]
        shown = [(*row[:3], _wrapped(row[3])) for row in rows if row[1] or row[2]]
        shown.append(("all", self.read, self.filled + len(self.initial), ""))
        headers = ["weights", "checkpoint", "model", ""]
        return str(tabulate(shown, headers=headers, colalign=("left", "right", "right", "left")))

    def _taken(self) -> list[tuple[str, int, int, str]]:
        """For each way to fill weights its name, how many it read and filled, and details."""
        groups = [
            ("taken as they are", self.matched, ""),
            ("renamed", self.renamed, _arrows(self.renamed)),
            ("joined", self.packed, _arrows(self.packed)),
            ("reshaped", self.reshaped, "1x1 convolutions to linear layers"),
            ("resized", self.resized, _counted(_changes(self.resized))),
            ("rows of classes taken", self.class_rows, _counted(self.class_rows.values())),
        ]
        # One weight of theirs may fill several of ours, and several one.
        read = {
            "renamed": len(set(self.renamed.values())),
            "joined": sum(map(len, self.packed.values())),
        }
        return [
            (way, read.get(way, len(names)), len(names), details) for way, names, details in groups
        ]


def _arrows(sources: dict[str, str] | dict[str, tuple[str, ...]]) -> str:
    """One example of what is made of what."""
    for name, theirs in sources.items():
        return f"{theirs if isinstance(theirs, str) else ' + '.join(theirs)} -> {name}"
    return ""


def _changes(shapes: dict[str, tuple[Shape, Shape]]) -> list[str]:
    return [f"{_shape(before)} to {_shape(after)}" for before, after in shapes.values()]


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _counted(texts: Iterable[str]) -> str:
    counts = Counter(texts).most_common()
    listed = [f"{text} ({_weights(count)})" for text, count in counts[:_REASONS]]
    if rest := counts[_REASONS:]:
        listed.append(f"{len(rest)} others ({_weights(sum(count for _, count in rest))})")
    return "; ".join(listed)


def _weights(count: int) -> str:
    return f"{count} weight{'' if count == 1 else 's'}"


def _wrapped(text: str) -> str:
    """The text in lines, broken where an item ends, or between words of a long one."""
    items = text.split("; ")
    # Lines are not broken at such spaces.
    kept = [one if len(one) >= _DETAIL_WIDTH else one.replace(" ", "\xa0") for one in items]
    lines = textwrap.wrap(
        "; ".join(kept), _DETAIL_WIDTH, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\xa0", " ")


def _with_reasons(keys: dict[str, str]) -> str:
    return _examples([f"{key} ({reason})" for key, reason in keys.items()])


def _examples(names: Sequence[str]) -> str:
    rest = len(names) - _EXAMPLES
    return ", ".join(names[:_EXAMPLES]) + (f" and {rest} more" if rest > 0 else "")
