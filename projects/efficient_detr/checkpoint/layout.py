"""What is known about a published format of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from efficient_detr.checkpoint.conversion import Row, matches_template

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""Key -> shape of all weights of a file or of a model."""


@dataclass(frozen=True)
class ClassRows:
    """Weights of which each row belongs to a class.

    Attributes:
        ours: template of our names.
        unused: rows at the end of theirs that stand for no class; they are dropped. When they are
            written, embeddings get zeros, and class layers logits that never win.
        in_order: whether the rows keep their numbers when the classes of the file are put into
            another order, because the model reads the first ones whatever their class.
        applies: whether the rule is for a model with these shapes of ours; None for all.
    """

    ours: str
    unused: int = 0
    in_order: bool = False
    applies: Callable[[Shapes], bool] | None = None


DETECTOR_CLASS_ROWS = (
    ClassRows("detector.decoder.heads.{layer}.class_layer.*"),
    ClassRows("detector.encoder_heads.heads.{layer}.class_layer.*"),
    ClassRows("detector.proposals.head.class_layer.*"),
    ClassRows("detector.denoising.label_embedding.*"),
)
"""Ours with rows of classes, where a format has no rules of its own."""


@dataclass(frozen=True)
class CheckpointFormat:
    """A layout in which checkpoints of whole detectors are published.

    Attributes:
        name: on command lines.
        title: for messages, "Deformable DETR of fundamentalvision/Deformable-DETR".
        marks: templates of keys by which it is recognised, each of which some key must match.
        excluded: templates of keys that other formats with the same marks have.
        read_table: the table for a file, made from the shapes of its weights.
        write_table: the table for a model of ours, made from the shapes of its weights.
        no_object: whether class layers have a row for "no object" after those of classes.
        class_rows: weights with rows of classes; of several rules that fit the first decides.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    read_table: Callable[[Shapes], list[Row]]
    write_table: Callable[[Shapes], list[Row]]
    excluded: tuple[str, ...] = ()
    no_object: bool = False
    class_rows: tuple[ClassRows, ...] = field(default=DETECTOR_CLASS_ROWS)

    def fits(self, keys: Collection[str]) -> bool:
        """Whether the keys of a file are of this format."""
        return all(_any(mark, keys) for mark in self.marks) and not any(
            _any(mark, keys) for mark in self.excluded
        )

    def class_rule(self, name: str, shapes: Shapes) -> ClassRows | None:
        """The rule for a weight of ours, None if its rows are no classes.

        Args:
            name: our name.
            shapes: of all weights of ours, with that name.
        """
        for rule in self.class_rows:
            if matches_template(rule.ours, name) and (not rule.applies or rule.applies(shapes)):
                return rule
        return None


def _any(template: str, keys: Collection[str]) -> bool:
    return any(matches_template(template, key) for key in keys)
