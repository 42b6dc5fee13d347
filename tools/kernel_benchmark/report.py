"""What the benchmark shows: tables, JSON, a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_benchmark.case import Comparison
from kernel_benchmark.timing import Timing
from matplotlib.figure import Figure
from tabulate import tabulate

from efficient_detr.files import replaced_file
from efficient_detr.visualization.figures import save_figure


@dataclass(frozen=True)
class Measurement:
    """A contender of one case.

    Attributes:
        timing: None if it could not take part.
        error: relative error; None if it was not compared with float64.
        problem: why it could not take part, or what is wrong with its result; "" if nothing is.
    """

    timing: Timing | None
    error: float | None
    problem: str = ""


@dataclass(frozen=True)
class Row:
    """Ours against the fastest of the references, which may be missing both.

    Attributes:
        comparison: what is compared.
        reference: name of the fastest reference; "" if none took part.
        ours, theirs: their measurements.
        compulsory_bytes: memory traffic that the work needs at least.
        bandwidth: bytes a second that a copy reaches in the same run.
    """

    comparison: Comparison
    reference: str
    ours: Measurement
    theirs: Measurement
    compulsory_bytes: int
    bandwidth: float

    @property
    def ratio(self) -> float | None:
        """Time of the reference divided by ours."""
        if self.ours.timing is None or self.theirs.timing is None:
            return None
        return self.theirs.timing.seconds / self.ours.timing.seconds

    @property
    def cpu_ratio(self) -> float | None:
        """The same of the computing times."""
        if self.ours.timing is None or self.theirs.timing is None:
            return None
        ours, theirs = self.ours.timing.cpu_seconds, self.theirs.timing.cpu_seconds
        return theirs / ours if ours and theirs else None

    @property
    def bytes_per_second(self) -> float | None:
        """Compulsory bytes divided by our time."""
        return self.compulsory_bytes / self.ours.timing.seconds if self.ours.timing else None


def make_row(
    comparison: Comparison,
    measurements: Mapping[str, Measurement],
    compulsory_bytes: int,
    bandwidth: float,
) -> Row:
    """Picks the fastest reference."""
    absent = Measurement(None, None, "not measured")
    times = {
        name: measurement.timing.seconds
        for name in comparison.references
        if (measurement := measurements.get(name, absent)).timing is not None
    }
    reference = min(times, key=times.__getitem__) if times else ""
    return Row(
        comparison=comparison,
        reference=reference,
        ours=measurements.get(comparison.ours, absent),
        theirs=measurements.get(reference, absent),
        compulsory_bytes=compulsory_bytes,
        bandwidth=bandwidth,
    )


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on."""
    machine = {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device.type,
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        machine["capability"] = f"{major}.{minor}"
        machine["device"] = torch.cuda.get_device_name(device)
    return machine


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_line(machine: Mapping[str, Any], bandwidth: float) -> str:
    """One sentence about the machine."""
    where = machine["device"] if machine["device"] != "cpu" else machine["cpu"]
    return (
        f"{where} ({machine['capability']}), {machine['threads']} of {machine['cores']} CPU "
        f"threads, torch {machine['torch']}; a copy reads and writes {bandwidth / 1e9:.1f} GB/s"
    )


# Tables ------------------------------------------------------------------------------------------

_HEADERS = (
    "case", "ours (ms)", "reference (ms)", "ratio", "required", "CPU ratio", "GB/s", "of floor",
    "max error",
)  # fmt: skip


def summary_table(rows: Iterable[Row], *, markdown: bool = False) -> str:
    """One line a comparison."""
    lines = [
        [
            f"`{row.comparison.name}`" if markdown else row.comparison.name,
            _milliseconds(row.ours),
            _milliseconds(row.theirs),
            _number(row.ratio, ".1f"),
            _number(row.comparison.required, ".1f"),
            _number(row.cpu_ratio, ".1f"),
            _number(row.bytes_per_second and row.bytes_per_second / 1e9, ".2f"),
            _number(row.bytes_per_second and row.bytes_per_second / row.bandwidth, ".0%"),
            _number(row.ours.error, ".1e"),
        ]
        for row in rows
    ]
    return _table(list(_HEADERS), lines, names=1, markdown=markdown)


def contender_table(cases: Mapping[str, Mapping[str, Measurement]]) -> str:
    """One line a contender of each case, including those that could not take part."""
    lines = []
    for title, measurements in cases.items():
        for index, (name, measured) in enumerate(measurements.items()):
            timing = measured.timing
            lines.append(
                [
                    title if index == 0 else "",
                    name,
                    _milliseconds(measured),
                    _number(timing and timing.cpu_seconds and 1000 * timing.cpu_seconds, ".2f"),
                    _number(timing and timing.spread, ".0%"),
                    _number(measured.error, ".1e"),
                    measured.problem,
                ]
            )
    headers = ["case", "contender", "ms", "CPU ms", "spread", "max error", "remark"]
    return _table(headers, lines, names=2, markdown=False)


def _table(headers: list[str], lines: list[list[str]], *, names: int, markdown: bool) -> str:
    alignment = ["left"] * names + ["right"] * (len(headers) - names)
    if headers[-1] == "remark":
        alignment[-1] = "left"
    form = "pipe" if markdown else "simple"
    return tabulate(lines, headers, tablefmt=form, disable_numparse=True, colalign=alignment)


def _milliseconds(measurement: Measurement) -> str:
    timing = measurement.timing
    return _number(timing and 1000 * timing.seconds, ".2f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# Files -------------------------------------------------------------------------------------------


def as_json(
    rows: Iterable[Row],
    cases: Mapping[str, Mapping[str, Measurement]],
    machine: Mapping[str, Any],
    bandwidth: float,
) -> dict[str, Any]:
    """The numbers for programs.

    Returns:
        "machine"; "copy_gigabytes_per_second"; "cases": by row name `ratio`, `ours_ms`,
        `reference_ms`, `max_error` (None where not measured) and more; "contenders": by title of
        the case and name of the contender `ms`, `cpu_ms`, `spread`, `rounds`, `max_error`,
        `problem`.
    """
    return {
        "machine": dict(machine),
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "cases": {row.comparison.name: _row_as_json(row) for row in rows},
        "contenders": {
            title: {name: _measurement_as_json(measured) for name, measured in contenders.items()}
            for title, contenders in cases.items()
        },
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    ours, theirs, speed = row.ours.timing, row.theirs.timing, row.bytes_per_second
    return {
        "ratio": row.ratio,
        "ours_ms": ours and 1000 * ours.seconds,
        "reference_ms": theirs and 1000 * theirs.seconds,
        "max_error": row.ours.error,
        "ours": row.comparison.ours,
        "reference": row.reference or None,
        "required": row.comparison.required,
        "cpu_ratio": row.cpu_ratio,
        "gigabytes_per_second": speed and speed / 1e9,
        "fraction_of_floor": speed and speed / row.bandwidth,
        "problem": row.ours.problem or None,
    }


def _measurement_as_json(measured: Measurement) -> dict[str, Any]:
    timing = measured.timing
    return {
        "ms": timing and 1000 * timing.seconds,
        "cpu_ms": timing and timing.cpu_seconds and 1000 * timing.cpu_seconds,
        "spread": timing and timing.spread,
        "rounds": timing and timing.rounds,
        "max_error": measured.error,
        "problem": measured.problem or None,
    }


def save_json(found: Mapping[str, Any], path: Path) -> None:
    """Writes the file as a whole: readers never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # An error of infinity is no number to JSON.
    text = json.dumps(_without_infinity(found), indent=1, allow_nan=False)
    with replaced_file(path) as partial_path:
        partial_path.write_text(f"{text}\n", encoding="utf-8")


def _without_infinity(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {key: _without_infinity(value) for key, value in found.items()}
    if isinstance(found, float) and found in (float("inf"), float("-inf")):
        return "infinity"
    return found


def save_plot(rows: Iterable[Row], title: str, path: Path) -> None:
    """Draws the ratios as bars, with a tick where a ratio is required."""
    bars = [
        (row.comparison, ratio)
        for row in rows
        if (ratio := row.ratio) is not None and not row.comparison.is_part
    ]
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(bars))
    drawn = axes.barh(places, [ratio for _, ratio in bars], color="tab:blue")
    axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
    for place, (comparison, _) in zip(places, bars, strict=True):
        if comparison.required:
            axes.plot([comparison.required] * 2, [place - 0.4, place + 0.4], color="black")
    axes.set_yticks(places, [comparison.name for comparison, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("time of the reference / time of ours; black: required")
    axes.set_title(title, fontsize=8)
    save_figure(figure, path, dpi=130)
