"""What `analyze_model` shows: numbers for programs, and tables."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from efficient_detr.evaluation import (
    PADDED_HEADS,
    FlopCount,
    ParameterCount,
    describe_data,
    has_clusters,
)

GIGA = 1e9
MEGA = 1e6
TOTAL = "total"


@dataclass(frozen=True)
class Analysis:
    """What is known of one config.

    Attributes:
        name: stem of the config's file.
        counts: for each image; empty if nothing was asked that needs one.
        parameters: of the model.
        structure: its modules as text, or None if nobody asked.
        checkpoint: file of its weights, or None if they are random.
    """

    name: str
    counts: list[FlopCount]
    parameters: ParameterCount
    structure: str | None
    checkpoint: str | None

    def gflops(self) -> dict[str, list[float]]:
        """Billions of multiply-adds by stage, a value for each image; `TOTAL` comes last."""
        return _by_stage([count.stages for count in self.counts], GIGA)

    def activations(self) -> dict[str, list[float]]:
        """Activations by stage, a value for each image; `TOTAL` comes last."""
        return _by_stage([count.activations for count in self.counts], 1)

    def data(self) -> dict[str, float]:
        """What depends on the image, means over the images."""
        values: dict[str, list[float]] = defaultdict(list)
        for count in self.counts:
            for name, value in count.data.items():
                values[name].append(value)
        return {name: statistics.fmean(found) for name, found in values.items()}

    def uncounted(self) -> list[str]:
        """Operators without a count, by name."""
        return sorted({name for count in self.counts for name in count.uncounted})

    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of each image."""
        return [size for count in self.counts for size in count.image_sizes]


def _by_stage(images: Sequence[Mapping[str, int]], unit: float) -> dict[str, list[float]]:
    names = _in_order(images)
    stages = {name: [image.get(name, 0) / unit for image in images] for name in names}
    return stages | {TOTAL: [sum(image.values()) / unit for image in images]}


def _in_order(lists: Iterable[Iterable[str]]) -> list[str]:
    """All names, where each list says what comes after what."""
    ordered: list[str] = []
    for names in lists:
        place = 0
        for name in names:
            if name not in ordered:
                ordered.insert(place, name)
            place = ordered.index(name) + 1
    return ordered


def report(analyses: Sequence[Analysis], args: argparse.Namespace) -> str:
    """All that was asked for, as text."""
    counted_ones = [one for one in analyses if one.counts]
    parts = [_inputs(counted_ones, args)] if counted_ones else []
    parts.append(overview(analyses, args.tasks))
    if "parameter" in args.tasks:
        rows = {one.name: _millions(one.parameters) for one in analyses}
        parts.append(f"Parameters (M) by stage\n\n{stage_table(rows)}")
    if "activation" in args.tasks:
        rows = {one.name: _divided(one.activations(), MEGA) for one in analyses}
        parts.append(f"Activations (M) by stage\n\n{stage_table(rows)}")
    if counted_ones:
        data = {one.name: describe_data(one.data()) for one in counted_ones}
        operators = {
            one.name: ", ".join(name.removeprefix("aten::") for name in one.uncounted())
            for one in counted_ones
        }
        parts.append(_merged("Depends on the image, mean", data))
        parts.append(_merged("Operators seen, not counted", operators))
    if any(has_clusters(one.data()) for one in counted_ones):
        parts.append(PADDED_HEADS)
    untrained = [one.name for one in counted_ones if _is_clustered(one) and not one.checkpoint]
    if untrained:
        parts.append(
            f"Clusters of random weights mean little ({', '.join(untrained)}): give trained ones "
            "with --opts train.init_checkpoint=FILE."
        )
    parts += [f"{one.name}\n{one.structure}" for one in analyses if one.structure]
    return "\n\n".join(parts)


def _inputs(counted_ones: Iterable[Analysis], args: argparse.Namespace) -> str:
    if args.num_inputs:
        number = max(len(one.counts) for one in counted_ones)  # the test set may have fewer
        return f"Means over the first {number} image{'s' * (number != 1)} of the test set"
    height, width = args.image_size
    return f"One image of {height} x {width} pixels"


def overview(analyses: Sequence[Analysis], tasks: Sequence[str]) -> str:
    """The table of all configs: GFLOPs by stage, and the totals of what else was asked for."""
    rows: dict[str, dict[str, list[float]]] = {one.name: {} for one in analyses}
    for one in analyses:
        row = rows[one.name]
        if "flop" in tasks:
            stages = one.gflops()
            row |= {"GFLOPs" if name == TOTAL else name: found for name, found in stages.items()}
        if "parameter" in tasks:
            found = _millions(one.parameters)
            row |= {"parameters (M)": found[TOTAL], "trainable (M)": found["trainable"]}
        if "activation" in tasks:
            row["activations (M)"] = _divided(one.activations(), MEGA)[TOTAL]
    return stage_table(rows)


def stage_table(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A row a config and a column a stage that is anything in any of them."""
    columns = [
        column
        for column in _in_order(rows.values())
        if any(set(_cell(row.get(column, ()))) & set("123456789") for row in rows.values())
    ]
    lines = [
        [name, *(_cell(row.get(column, ())) for column in columns)] for name, row in rows.items()
    ]
    alignment = ("left", *["right"] * len(columns))
    return tabulate(
        lines, ["config", *columns], tablefmt="pipe", colalign=alignment, disable_numparse=True
    )


def _cell(values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several values; nothing for zero."""
    if not any(values):
        return ""
    mean = statistics.fmean(values)
    decimals = 2 if mean >= 1 else 4
    if len(values) < 2:
        return f"{mean:.{decimals}f}"
    return f"{mean:.{decimals}f} ± {statistics.stdev(values):.{decimals}f}"


def _divided(stages: Mapping[str, Sequence[float]], unit: float) -> dict[str, list[float]]:
    return {name: [value / unit for value in values] for name, values in stages.items()}


def _millions(parameters: ParameterCount) -> dict[str, list[float]]:
    stages = {name: [number / MEGA] for name, number in parameters.stages.items()}
    total, trainable = parameters.total / MEGA, parameters.trainable / MEGA
    return stages | {TOTAL: [total], "trainable": [trainable]}


def _merged(title: str, texts: Mapping[str, str]) -> str:
    """Lines of text about configs, those of equal text together."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, text in texts.items():
        names[text].append(name)
    lines = [f"  {', '.join(group)}: {text or 'none'}" for text, group in names.items()]
    return "\n".join([f"{title}:", *lines])


def _is_clustered(one: Analysis) -> bool:
    return any(name.startswith("dense-") for name in one.data())


def as_json(analyses: Sequence[Analysis], args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of all configs by name: GFLOPs, elements, and what depends on the image.

    All that is known is there: "parameters" always, the rest after a forward pass.
    """
    return {
        "image_size": None if args.num_inputs else list(args.image_size),
        "inputs": max(len(one.counts) for one in analyses),
        "overrides": list(args.opts),
        "configs": {one.name: _entry(one) for one in analyses},
    }


def _entry(one: Analysis) -> dict[str, Any]:
    parameters = one.parameters
    entry: dict[str, Any] = {
        "checkpoint": one.checkpoint,
        "parameters": {
            TOTAL: parameters.total,
            "trainable": parameters.trainable,
            "stages": parameters.stages,
        },
    }
    if not one.counts:
        return entry
    gflops = one.gflops()
    entry |= {
        "inputs": len(one.counts),
        "image_sizes": one.image_sizes(),
        "gflops": _means(gflops),
        "activations": _means(one.activations()),
        "data": one.data(),
        "uncounted": one.uncounted(),
    }
    if len(one.counts) > 1:
        spread = {name: statistics.stdev(values) for name, values in gflops.items()}
        entry["gflops_spread"] = spread
    return entry


def _means(stages: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.fmean(values) for name, values in stages.items()}
