"""Write docs/combinations.md: which encoders, decoders, queries and losses combine.

    python -m tools.write_combinations

Every model of `tests/combinations.py` is built; what it says if it does not build becomes a note.
That those that build also train is shown by `pytest tests/test_combinations.py`.
"""

from __future__ import annotations

import logging
import sys
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

Encoder, token selection, queries and decoder are chosen by the config, each on its own. This table
is written by `python -m tools.write_combinations` from the models that
`pytest tests/test_combinations.py` builds; the test fails if the two differ.

* **yes**: the test builds the model from config nodes at a tiny size, trains a step on a padded
  batch, finds a gradient in every parameter and the same bits in a second run. In evaluation, each
  image of a padded batch is detected as alone, to 1e-4; letters stand for the exceptions.
* **no**: building the model fails; the number stands for what it says.
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


def main() -> int:
    """Run the command; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with replaced_file(DOCUMENT) as path:
        path.write_text(document())
    logger.info("wrote %s", DOCUMENT)
    return 0


def document() -> str:
    """The text of the document."""
    notes: dict[str, int] = {}
    parts = [INTRODUCTION]
    for num_levels in FEATURES:
        levels = "one level" if num_levels == 1 else "several levels"
        parts.append(f"## Encoder and decoder, memory of {levels}\n")
        rows = [c for c in combinations() if c.num_levels == num_levels]
        titles = [decoder.title for decoder in DECODERS]
        parts.append(_table("encoder", [e.title for e in ENCODERS], titles, rows, notes))
    parts.append("## Queries and cross-attention\n")
    parts.append(
        _table("queries", [*QUERY_SOURCES], [*DECODER_ATTENTIONS], query_combinations(), notes)
    )
    parts.append("## Why not\n")
    parts.append("".join(f"{number}. {note}\n" for note, number in notes.items()))
    parts.append(PADDING)
    parts.append("".join(f"* **{LETTERS[t]}**: {why}\n" for t, why in PADDING_TRAITS.items()))
    parts += [GRADIENTS, OTHERS, _others(), MISFITS, _misfits()]
    return "\n".join(parts)


def _table(
    corner: str,
    rows: list[str],
    columns: list[str],
    cells: list[Combination],
    notes: dict[str, int],
) -> str:
    """A Markdown table of combinations that are listed row by row; adds to the notes."""
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for index, row in enumerate(rows):
        part = cells[index * len(columns) : (index + 1) * len(columns)]
        lines.append(f"| {row} | " + " | ".join(_cell(c, notes) for c in part) + " |")
    return "\n".join(lines) + "\n"


def _cell(combination: Combination, notes: dict[str, int]) -> str:
    sentence = refusal(combination)
    if sentence is not None:
        return f"no ({notes.setdefault(sentence, len(notes) + 1)})"
    letters = "".join(LETTERS[trait] for trait in padding_traits(combination))
    return f"yes ({letters})" if letters else "yes"


def _others() -> str:
    lines = ["| encoder | decoder | self-attention | queries | refinement |", "|---" * 5 + "|"]
    for combination in other_combinations():
        encoder, decoder = combination.encoder, combination.decoder
        names = [
            f"{encoder.layer.__name__}, {encoder.attention.__name__}",
            f"{decoder.layer.__name__}, {decoder.attention.__name__}",
            decoder.self_attention.__name__,
            decoder.queries.__name__,
            decoder.refinement.__name__,
        ]
        lines.append("| " + " | ".join(names) + " |")
    return "\n".join(lines) + "\n"


def _misfits() -> str:
    lines = ["| what is wrong | what building the model says |", "|---|---|"]
    lines += [f"| {misfit.title} | {misfit.sentence()} |" for misfit in misfits()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
