"""Write docs/combinations.md: which encoders, decoders, queries and losses combine.

    python -m tools.write_combinations

Every model of `tests/combinations.py` is built; what it says if it does not build becomes a note.
That those that build also train is shown by `pytest tests/test_combinations.py`.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from efficient_detr.files import replaced_file
from tests.combination_parts import FEATURES, Combination
from tests.combinations import (
    DECODER_ATTENTIONS,
    DECODERS,
    ENCODERS,
    PADDING_TRAITS,
    QUERY_SOURCES,
    combinations,
    other_combinations,
    padding_traits,
    query_combinations,
    refusal,
)
from tests.misfits import misfits

logger = logging.getLogger(__name__)

DOCUMENT = Path(__file__).parents[1] / "docs" / "combinations.md"
LETTERS = dict(zip(PADDING_TRAITS, "abcdefgh", strict=False))

INTRODUCTION = """\
# What combines with what

Encoder, token selection, queries and decoder are chosen by the config, each on its own. For
example SMCA behind an encoder with clustered attention, as a file beside the other configs:

```python
from .common.models.act_detr import act_detr
from .smca_detr import dataloader, lr_multiplier, model, optimizer, train

model.detector.encoder = act_detr().detector.encoder
train.output_dir = "output/smca_act"
```

The tables are written by `python -m tools.write_combinations` from the models that
`pytest tests/test_combinations.py` builds; the test fails if the two differ.

* **yes**: the test builds the model from config nodes at a tiny size, trains a step on a padded
  batch, finds a gradient in every parameter and the same bits in a second run. In evaluation, each
  image of a padded batch is detected as alone, to 1e-4; letters stand for the exceptions.
* **no**: building the model fails; the number stands for what it says. What goes with nothing is
  left out of a table and named below it.
"""

PADDING = """\
## Padding

What an image is padded with, and how much, does not matter, but for traits of published models.
The test puts these traits aside one by one and finds that nothing else depends on the padding.
Backbone and neck are not part of this: their convolutions and group norms see zeros beyond an image
that ends inside a batch, as in all published models.
"""

GRADIENTS = """\
## Parameters without a gradient

Queries of `LearnedQueries` have zero content, as published. So all values of the first layer's
self-attention are equal, and its input weights (in pre-norm layers also the weight of the norm
before it) have a gradient of zero. All other parameters have another one.
"""

OTHERS = """\
## Other parts

Tested in the same way beside the tables:
"""

MISFITS = """\
## Other parts that do not fit

Names in brackets are classes; the rest are keys of the config.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=DOCUMENT, metavar="FILE")
    output = parser.parse_args(argv).output
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with replaced_file(output) as path:
        path.write_text(document())
    logger.info("wrote %s", output)
    return 0


def document() -> str:
    """The text of the document."""
    notes: dict[str, int] = {}
    parts = [INTRODUCTION]
    for num_levels in FEATURES:
        levels = "one level" if num_levels == 1 else "several levels"
        parts.append(f"## Encoder and decoder, memory of {levels}\n")
        rows = [c for c in combinations() if c.num_levels == num_levels]
        encoders, decoders = [e.title for e in ENCODERS], [d.title for d in DECODERS]
        parts.append(_table(("encoder", "decoder"), encoders, decoders, rows, notes))
    parts.append("## Queries and cross-attention\n")
    parts.append(
        _table(
            ("queries", "cross-attention"),
            [*QUERY_SOURCES],
            [*DECODER_ATTENTIONS],
            query_combinations(),
            notes,
        )
    )
    parts.append("## Why not\n")
    parts.append("".join(f"{number}. {note}\n" for note, number in notes.items()))
    parts.append(PADDING)
    parts.append("".join(f"* **{LETTERS[t]}**: {why}\n" for t, why in PADDING_TRAITS.items()))
    parts += [GRADIENTS, OTHERS, _others(), MISFITS, _misfits()]
    return "\n".join(parts)


def _table(
    sides: tuple[str, str],
    rows: list[str],
    columns: list[str],
    combinations: list[Combination],
    notes: dict[str, int],
) -> str:
    """A Markdown table of combinations that are listed row by row; adds to the notes."""
    cells = dict(zip(itertools.product(rows, columns), combinations, strict=True))
    fits = {place for place, combination in cells.items() if refusal(combination) is None}
    kept_rows = [row for row in rows if any((row, column) in fits for column in columns)]
    kept_columns = [column for column in columns if any((row, column) in fits for row in rows)]
    lines = [
        f"| {sides[0]} | " + " | ".join(kept_columns) + " |",
        "|---" * (len(kept_columns) + 1) + "|",
    ]
    for row in kept_rows:
        texts = [_cell(cells[row, column], notes) for column in kept_columns]
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    lines.append("")
    alone = {row: [(row, column) for column in kept_columns] for row in rows}
    lines += _left_out(sides[1], kept_rows, alone, cells, notes)
    alone = {column: [(row, column) for row in kept_rows] for column in columns}
    lines += _left_out(sides[0], kept_columns, alone, cells, notes)
    return "\n".join(lines)


def _left_out(
    side: str,
    kept: list[str],
    places: dict[str, list[tuple[str, str]]],
    cells: dict[tuple[str, str], Combination],
    notes: dict[str, int],
) -> list[str]:
    """Lines about rows or columns that go with nothing; `places` are their cells by title."""
    lines = []
    for title in places:
        if title not in kept:
            reasons = dict.fromkeys(_cell(cells[place], notes) for place in places[title])
            lines.append(f"* {title}: {', '.join(reasons)}")
    return [f"With no {side}:\n", *lines, ""] if lines else []


def _cell(combination: Combination, notes: dict[str, int]) -> str:
    sentence = refusal(combination)
    if sentence is not None:
        return f"no ({notes.setdefault(sentence, len(notes) + 1)})"
    letters = "".join(LETTERS[trait] for trait in padding_traits(combination))
    return f"yes ({letters})" if letters else "yes"


def _others() -> str:
    parts = []
    for title, group in other_combinations().items():
        lines = [
            f"{title}:\n",
            "| encoder attention | cross-attention | queries | refinement |",
            "|---" * 4 + "|",
        ]
        for combination in group:
            decoder = combination.decoder
            kinds = (
                combination.encoder.attention,
                decoder.attention,
                decoder.queries,
                decoder.refinement,
            )
            lines.append("| " + " | ".join(kind.__name__ for kind in kinds) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _misfits() -> str:
    lines = ["| what is wrong | what building the model says |", "|---|---|"]
    lines += [f"| {misfit.title} | {misfit.sentence()} |" for misfit in misfits()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
