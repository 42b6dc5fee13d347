"""What the benchmark of models shows: numbers for programs, and tables."""

from __future__ import annotations

import argparse
import functools
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from kernel_benchmark.passes import INFERENCE, TRAINING, Contender
from kernel_benchmark.report import describe_machine
from kernel_benchmark.stages import Duration
from kernel_benchmark.timing import spread_of
from tabulate import tabulate

from efficient_detr.evaluation.flops import OTHER_STAGE

MEDIANS_NOTE = "Each number is a median by itself: stages need not add up exactly to the whole."


def as_json(contenders: Sequence[Contender], arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers for programs.

    Returns:
        "machine"; what was measured, with which "overrides" of the configs and which "checkpoint"
        (None, because weights are random); "configs": by stem "inference" and "training", each None
        or with "rounds" (fewer than wanted after an interruption), "ms", "cpu_ms" (computing time;
        None on a GPU), "spread", "images_per_second", "ratio", "peak_bytes" and by stage "stages";
        "problems": why something is None though it was wanted.
    """
    configs: dict[str, dict[str, Any]] = {
        one.name: {INFERENCE: None, TRAINING: None} for one in contenders
    }
    for one in contenders:
        if one.samples and not one.problem:
            configs[one.name][one.kind] = summarize(one, arguments.batch_size)
    for kind in (INFERENCE, TRAINING):
        baseline = configs[arguments.baseline or contenders[0].name][kind]
        for found in configs.values():
            if found[kind] is not None:
                found[kind]["ratio"] = ratio_of(found[kind], baseline)
    return {
        "machine": describe_machine(torch.device(arguments.device)),
        **{key: getattr(arguments, key) for key in ("image_size", "batch_size", "precision")},
        **{key: getattr(arguments, key) for key in ("compile", "rounds")},
        "baseline": arguments.baseline or contenders[0].name,
        "overrides": list(arguments.opts),
        "checkpoint": None,
        "configs": configs,
        "problems": [one.problem for one in contenders if one.problem],
    }


def summarize(contender: Contender, batch_size: int) -> dict[str, Any]:
    """The numbers of one contender."""
    samples = contender.samples
    wholes = [total_of(sample.values()) for sample in samples]
    stages = {
        stage: statistics_of([sample[stage] for sample in samples]) for stage in contender.stages
    }
    return {
        "rounds": len(samples),
        **statistics_of(wholes),
        "images_per_second": batch_size / statistics.median(one.seconds for one in wholes),
        "peak_bytes": contender.peak_bytes,
        "stages": stages,
    }


def total_of(durations: Iterable[Duration]) -> Duration:
    """All together."""
    return functools.reduce(operator.add, durations)


def statistics_of(durations: Sequence[Duration]) -> dict[str, float | None]:
    """Median and spread."""
    seconds = [one.seconds for one in durations]
    computing = [one.cpu_seconds for one in durations if one.cpu_seconds is not None]
    return {
        "ms": 1000 * statistics.median(seconds),
        "cpu_ms": 1000 * statistics.median(computing) if computing else None,
        "spread": spread_of(seconds),
    }


def ratio_of(found: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> float | None:
    """Time of a config divided by that of the baseline, which may be missing."""
    if baseline is None:
        return None
    key = "ms" if baseline["cpu_ms"] is None else "cpu_ms"
    return float(found[key] / baseline[key])


def stages_of(contenders: Iterable[Contender]) -> list[str]:
    """The stages that ran in any of them, in the order of the first, with the rest last."""
    names = [name for one in contenders for name in one.stages]
    return [*dict.fromkeys(name for name in names if name != OTHER_STAGE), OTHER_STAGE]


def tables(contenders: Sequence[Contender], arguments: argparse.Namespace) -> str:
    """A table of wholes and one of stages for each kind of work."""
    found = as_json(contenders, arguments)["configs"]
    style = "github" if arguments.markdown else "simple"
    parts = []
    for kind in (INFERENCE, TRAINING):
        lines = {name: kinds[kind] for name, kinds in found.items() if kinds[kind] is not None}
        if not lines:
            continue
        ran = stages_of(one for one in contenders if one.kind == kind)
        chosen = [name for name in ran if name in (arguments.stages or ran)]
        parts += [
            f"{kind.capitalize()}\n\n{whole_table(lines, style)}",
            f"{stage_title(kind, lines)}\n\n{stage_table(lines, chosen, style)}",
            MEDIANS_NOTE,
        ]
    return "\n\n".join(parts)


def whole_table(lines: Mapping[str, Mapping[str, Any]], style: str) -> str:
    """One line a config: latency, throughput, ratio, memory."""
    headers = ["config", "ms", "spread", "CPU ms", "images/s", "ratio", "peak MB"]
    cells = [
        [
            name,
            _number(found["ms"], ".1f"),
            _number(found["spread"], ".0%"),
            _number(found["cpu_ms"], ".1f"),
            _number(found["images_per_second"], ".2f"),
            _number(found["ratio"], ".3f"),
            _number(found["peak_bytes"] and found["peak_bytes"] / 1e6, ".0f"),
        ]
        for name, found in lines.items()
    ]
    return _table(headers, cells, style)


def stage_title(kind: str, lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Which time of the stages the table shows."""
    time = "Latency" if _on_gpu(lines) else "Computing time of all threads"
    return f"{time} of {kind} by stage, in ms"


def _on_gpu(lines: Mapping[str, Mapping[str, Any]]) -> bool:
    return all(found["cpu_ms"] is None for found in lines.values())


def stage_table(lines: Mapping[str, Mapping[str, Any]], stages: Sequence[str], style: str) -> str:
    """One line a config: a median for each stage.

    Of computing times on a CPU, because other processes hardly change them and their sum comes near
    the whole; of latencies on a GPU, with their spread.
    """
    show = _latency if _on_gpu(lines) else _computing_time
    cells = [
        [
            name,
            *(
                show(found["stages"][stage]) if stage in found["stages"] else "-"
                for stage in stages
            ),
        ]
        for name, found in lines.items()
    ]
    return _table(["config", *stages], cells, style)


def _latency(found: Mapping[str, Any]) -> str:
    return f"{found['ms']:.1f} (+{found['spread']:.0%})"


def _computing_time(found: Mapping[str, Any]) -> str:
    return f"{found['cpu_ms']:.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(headers: list[str], cells: list[list[str]], style: str) -> str:
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(cells, headers, tablefmt=style, disable_numparse=True, colalign=alignment)
