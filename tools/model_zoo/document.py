"""The text and the tables of `docs/model_zoo.md`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.model_zoo.measured import Measurements, Size
from tools.model_zoo.published import SCORES, AuthorsCode, Family, Model, Published
from tools.model_zoo.texts import (
    AUTHORS_CODE,
    DATA_DEPENDENCE,
    ENCODER_COMPARISON,
    INTRODUCTION,
    MEASURED_ACCURACY,
    PROVENANCE,
    PUBLISHED_GFLOPS,
    QUOTED_ACCURACY,
)

SIZE: Size = (800, 1333)
"""Size of the image for which the models are compared."""

MEAN_SIZE: Size = (850, 1040)
"""An image that costs about as much as the mean over 100 images of COCO."""

# Kinds of encoder attention, and the config that stands for each in the comparison of encoders.
ENCODERS = {
    "detr_dc5": "dense (DETR-DC5)",
    "act_detr": "clustered (ACT, random weights)",
    "deformable_detr_two_stage": "deformable (Deformable DETR)",
    "sparse_detr": "sparse (Sparse DETR, 30 %)",
    "dino": "deformable (DINO)",
    "focus_detr": "focus (Focus-DETR)",
}

UNKNOWN = "-"
NUMBER = re.compile(r"[-+]?[\d.,]+( [MG+*].*)?$|-$")


@dataclass(frozen=True)
class Zoo:
    """Everything the document is made of.

    Attributes:
        published: quoted figures.
        analyses: counted GFLOPs and parameters.
        benchmarks: latencies; empty if none were measured.
        results: of evaluations, by config: `bbox` in percent, and `flops`.
    """

    published: Published
    analyses: Measurements
    benchmarks: Measurements = field(default_factory=Measurements)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)


def document(zoo: Zoo) -> str:
    """The text of the document."""
    parts = [
        INTRODUCTION,
        *(family_section(zoo, family) for family in zoo.published.families),
        MEASURED_ACCURACY,
        measured_accuracy(zoo),
        QUOTED_ACCURACY,
        quoted_accuracy(zoo.published),
        AUTHORS_CODE,
        authors_code(zoo),
        published_gflops(zoo),
        data_dependence(zoo),
        ENCODER_COMPARISON,
        encoder_comparison(zoo),
        PROVENANCE,
        provenance(zoo),
    ]
    return "\n".join(part.strip() + "\n" for part in parts if part)


# Families ----------------------------------------------------------------------------------------

_FAMILY_HEADS = [
    *("config", "epochs, quoted", "AP, quoted", "AP, measured"),
    *("parameters, quoted", "parameters, measured"),
    *("GFLOPs, quoted", "GFLOPs, measured", "ours / authors' code, measured"),
    *("encoder GFLOPs, measured", "latency / baseline's, measured", "baseline"),
]


def family_section(zoo: Zoo, family: Family) -> str:
    """Heading, table and remarks of one family."""
    rows = [_family_row(zoo, model) for model in family.models]
    remarks = [f"* `{model.config}`: {model.remark}" for model in family.models if model.remark]
    remarks += [""] if remarks else []
    return "\n".join(
        [f"## {family.title}\n", family.text, "", table(_FAMILY_HEADS, rows), *remarks]
    )


def _family_row(zoo: Zoo, model: Model) -> list[str]:
    entry = zoo.analyses.at(SIZE)[model.config]
    gflops = entry["gflops"]
    measured = zoo.results.get(model.config, {}).get("bbox", {}).get("AP")
    return [
        _link(zoo.published, model.config),
        model.epochs or UNKNOWN,
        number(model.precision, 1),
        number(measured, 1),
        millions(model.parameters),
        f"{entry['parameters']['total']:,}",
        UNKNOWN if model.gflops is None else f"{model.gflops.value:g}",
        number(gflops["total"], 2),
        _code_cell(gflops, model.code),
        _encoder_cell(gflops, model.code),
        number(latency_ratio(zoo.benchmarks, model), 2),
        f"`{model.baseline}`" if model.baseline else UNKNOWN,
    ]


def _link(published: Published, name: str) -> str:
    variant = published.variants.get(name)
    return f"[`{name}`](../configs/{variant.config if variant else name}.py)"


def _code_cell(gflops: dict[str, float], code: AuthorsCode | None) -> str:
    if code is None:
        return UNKNOWN
    return number(gflops["total"] / code.gflops, 4) + (" *" if code.reconstruction else "")


def _encoder_cell(gflops: dict[str, float], code: AuthorsCode | None) -> str:
    if "encoder" not in gflops:
        return UNKNOWN
    selection = gflops.get("selection")
    text = number(gflops["encoder"], 2) + ("" if selection is None else f" + {selection:.2f}")
    # Where the authors' code draws the border elsewhere, a reader may know its number.
    return f"{text} *" if code and code.encoder_differences else text


def latency_ratio(benchmarks: Measurements, model: Model) -> float | None:
    """Time of a model divided by that of its baseline in the same run, or None."""
    entries = benchmarks.at(SIZE)
    if not model.baseline or not benchmarks.in_one_run(SIZE, model.config, model.baseline):
        return None
    own, other = (entries.get(name) for name in (model.config, model.baseline))
    if own is None or other is None:
        return None
    return milliseconds(own["inference"]) / milliseconds(other["inference"])


def milliseconds(found: dict[str, Any]) -> float:
    """Computing time where there is one, which hardly depends on other processes; else latency."""
    computing = found.get("cpu_ms")
    return float(found["ms"] if computing is None else computing)


def encoder_gflops(entry: dict[str, Any]) -> float | None:
    """GFLOPs of the encoder and of the selection of its tokens, or None."""
    gflops = entry["gflops"]
    if "encoder" not in gflops:
        return None
    return float(gflops["encoder"] + gflops.get("selection", 0.0))


def encoder_milliseconds(entry: dict[str, Any]) -> float | None:
    """Time of the encoder and of the selection of its tokens, or None."""
    stages = entry["inference"].get("stages", {})
    if "encoder" not in stages:
        return None
    return sum(milliseconds(stages[name]) for name in ("encoder", "selection") if name in stages)


# Accuracy ----------------------------------------------------------------------------------------


def measured_accuracy(zoo: Zoo) -> str:
    """A table of the evaluations that were given."""
    heads = ["config", *(f"{score}, measured" for score in SCORES)]
    heads += ["parameters, measured", "GFLOPs, measured"]
    rows = []
    for config, result in zoo.results.items():
        flops = result["flops"]
        parameters = flops.get("parameters")
        rows.append(
            [
                f"[`{config}`](../configs/{config}.py)",
                *(number(result["bbox"].get(score), 1) for score in SCORES),
                UNKNOWN if parameters is None else f"{int(parameters):,}",
                number(flops.get("GFLOPs"), 3),
            ]
        )
    return table(heads, rows) if rows else "No evaluation was given.\n"


def quoted_accuracy(published: Published) -> str:
    """A table of all results with where they stand."""
    rows = [
        [
            f"`{model.config}`",
            *(number(result.scores.get(score), 1) for score in SCORES),
            result.epochs or UNKNOWN,
            millions(result.parameters),
            published.sources[result.source],
        ]
        for model in published.models.values()
        for result in model.results
    ]
    heads = ["config", *(f"{score}, quoted" for score in SCORES), "epochs, quoted"]
    return table([*heads, "parameters, quoted", "source"], rows)


# GFLOPs ------------------------------------------------------------------------------------------


def authors_code(zoo: Zoo) -> str:
    """Our count beside that of the authors' code, and what makes the difference."""
    published = zoo.published
    used = [
        reason
        for model in published.models.values()
        if model.code
        for reason in (*model.code.differences, *model.code.encoder_differences)
    ]
    letters = dict(zip(dict.fromkeys(used), "abcdefgh", strict=False))
    heads = ["config", "part", "authors' code, measured", "ours, measured", "ours - theirs"]
    heads += ["because", "unexplained"]
    rows = [
        row
        for model in published.models.values()
        if model.code
        for row in _code_rows(model.config, model.code, zoo, letters)
    ]
    notes = [f"* **{letter}**: {published.reasons[reason]}." for reason, letter in letters.items()]
    return "\n".join([table(heads, rows), *notes])


def _code_rows(
    config: str, code: AuthorsCode, zoo: Zoo, letters: dict[str, str]
) -> Iterable[list[str]]:
    gflops = zoo.analyses.at(SIZE)[config]["gflops"]
    for part, ours, theirs, differences in (
        ("model", gflops["total"], code.gflops, code.differences),
        ("encoder", gflops.get("encoder"), code.encoder, code.encoder_differences),
    ):
        if ours is None:
            continue
        because = ", ".join(f"{letters[why]} {much:+.3f}" for why, much in differences.items())
        yield [
            f"`{config}`" if part == "model" else "",
            part,
            number(theirs, 3),
            number(ours, 3),
            signed(ours - theirs),
            because or UNKNOWN,
            signed(ours - theirs - sum(differences.values())),
        ]


def published_gflops(zoo: Zoo) -> str:
    """Quoted GFLOPs beside those counted on an image of the mean cost."""
    entries = zoo.analyses.at(MEAN_SIZE)
    rows = []
    for model in zoo.published.models.values():
        cost = model.gflops
        if cost is None:
            continue
        protocol = zoo.published.protocols[cost.protocol]
        ours = entries[model.config]["gflops"]["total"] if model.config in entries else None
        comparable = ours if protocol.mean_image else None
        rows.append(
            [
                f"`{model.config}`",
                f"{cost.value:g}",
                protocol.text,
                zoo.published.sources[cost.source],
                number(model.code.mean_image if model.code else None, 1),
                number(comparable, 1),
                number(None if comparable is None else comparable / cost.value, 3),
            ]
        )
    heads = ["config", "GFLOPs, quoted", "counted on", "source"]
    size = "{}x{}".format(*MEAN_SIZE)
    heads += [f"authors' GFLOPs at {size}, measured"]
    heads += [f"our GFLOPs at {size}, measured", "ours / quoted"]
    return PUBLISHED_GFLOPS + "\n" + table(heads, rows)


def data_dependence(zoo: Zoo) -> str:
    """Kept tokens and clusters of each encoder layer, as the analysis measured them."""
    rows = []
    for model in zoo.published.models.values():
        entry = zoo.analyses.at(SIZE)[model.config]
        found = entry.get("data") or {}
        kept = _layers(found, "tokens-encoder-")
        ratios = cluster_ratios(entry)
        dense = _layers(found, "dense-encoder-")
        if kept:
            text = ", ".join(f"{value:,.0f}" for value in kept)
            rows.append([f"`{model.config}`", "tokens kept", text, _of_all(found)])
        if ratios:
            text = ", ".join(f"{value:.3f}" for value in ratios)
            fell_back = sum(dense)
            note = f"{fell_back:g} of {len(ratios)} layers fell back to dense attention"
            rows.append([f"`{model.config}`", "clusters / tokens", text, note])
    if not rows:
        return ""
    heads = ["config", "what", "in the layers of the encoder, measured", "note"]
    return DATA_DEPENDENCE + "\n" + table(heads, rows)


def cluster_ratios(entry: dict[str, Any]) -> list[float]:
    """Clusters divided by tokens in each encoder layer that clusters; empty for most models."""
    return _layers(entry.get("data") or {}, "cluster-ratio-encoder-")


def _layers(found: dict[str, float], prefix: str) -> list[float]:
    numbered = {
        int(name.removeprefix(prefix)): value
        for name, value in found.items()
        if re.fullmatch(re.escape(prefix) + r"\d+", name)
    }
    return [value for _, value in sorted(numbered.items())]


def _of_all(found: dict[str, float]) -> str:
    total = found.get("tokens-total")
    return "" if total is None else f"of {total:,.0f}"


# Encoders ----------------------------------------------------------------------------------------


def encoder_comparison(zoo: Zoo) -> str:
    """GFLOPs and times of the encoders that stand for a kind of attention, by image size."""
    sizes = sorted(
        size
        for size in {*zoo.analyses.entries, *zoo.benchmarks.entries} - {MEAN_SIZE}
        if all(config in zoo.analyses.at(size) for config in ENCODERS)
    )
    heads = ["encoder, with its selection"]
    heads += [f"{height}x{width}" for height, width in sizes]
    rows = []
    for config, title in ENCODERS.items():
        cells = []
        for size in sizes:
            analysis, timing = (
                measured.at(size).get(config) for measured in (zoo.analyses, zoo.benchmarks)
            )
            gflops = None if analysis is None else encoder_gflops(analysis)
            time = None if timing is None else encoder_milliseconds(timing)
            cells.append(f"{number(gflops, 1)} G, {number(time, 0)} ms")
        rows.append([title, *cells])
    return table(heads, rows)


# Provenance --------------------------------------------------------------------------------------


def provenance(zoo: Zoo) -> str:
    """Commands, machine, and what was not measured."""
    settings = dict(zoo.benchmarks.settings)
    machine = settings.pop("machine", {})
    lines = []
    if machine:
        facts = ", ".join(f"{name} {value}" for name, value in {**machine, **settings}.items())
        lines.append(f"Times are from this machine: {facts}.")
    else:
        lines.append("No times were measured.")
    missing = sorted(set(zoo.published.models) - set(zoo.benchmarks.at(SIZE)))
    if machine and missing:
        lines.append(f"Not timed: {', '.join(f'`{name}`' for name in missing)}.")
    return "\n".join(lines)


# Cells -------------------------------------------------------------------------------------------


def number(value: float | None, digits: int) -> str:
    """A cell: a number, or the sign for an unknown one."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def millions(value: float | None) -> str:
    """A cell: millions of parameters, as exact as somebody gave them."""
    return UNKNOWN if value is None else f"{value:g} M"


def signed(value: float) -> str:
    """A difference with three digits, without a negative zero."""
    return f"{round(value, 3) + 0.0:+.3f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are aligned right."""
    columns = zip(*rows, strict=True)
    rules = ["---:" if all(NUMBER.match(cell) for cell in column) else "---" for column in columns]
    return "".join("| " + " | ".join(line) + " |\n" for line in [heads, rules, *rows])
