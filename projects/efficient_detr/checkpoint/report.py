"""What became of every weight of a published checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

Shape = tuple[int, ...]

_EXAMPLES = 3


@dataclass
class LoadReport:
    """What became of every weight of a checkpoint, and of every parameter that it should fill.

    Attributes:
        layout: name of the published layout.
        target: path of the module that was filled, '' for the whole model.
        matched: our names of tensors taken as they are.
        reshaped: our name -> shape in the checkpoint and in the model, with the same values.
        resized: our name -> shape in the checkpoint and in the model, interpolated.
        dropped: name in the checkpoint -> why it has no place in the model.
        initial: our names of parameters of the target, and of the head of a classifier around it,
            that the checkpoint does not fill.
        random_head: whether the head of a classifier is among them.
        parts: names of the parts of the checkpoint outside the backbone, which are left out.
    """

    layout: str
    target: str
    matched: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    initial: list[str] = field(default_factory=list)
    random_head: bool = False
    parts: list[str] = field(default_factory=list)

    @property
    def filled(self) -> int:
        """Number of parameters that got values."""
        return len(self.matched) + len(self.reshaped) + len(self.resized)

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
        """One row for each fate, with a count and its details."""
        reasons = Counter(self.dropped.values())
        changes = Counter(
            f"{_shape(before)} to {_shape(after)}" for before, after in self.resized.values()
        )
        rows = [
            ("matched", len(self.matched), ""),
            ("reshaped", len(self.reshaped), "1x1 convolutions to linear layers"),
            ("resized", len(self.resized), _counted(changes)),
            ("left out", len(self.dropped), _counted(reasons)),
            ("left at their initial values", len(self.initial), _examples(self.initial)),
        ]
        shown = [row for row in rows if row[1]]
        return str(tabulate(shown, headers=["", "weights", ""]))


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _counted(counts: Counter[str]) -> str:
    return "; ".join(f"{count} {text}" for text, count in counts.items())


def _examples(names: Sequence[str]) -> str:
    rest = len(names) - _EXAMPLES
    return ", ".join(names[:_EXAMPLES]) + (f" and {rest} more" if rest > 0 else "")
