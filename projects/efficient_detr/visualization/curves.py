"""Curves of a training run, from the `metrics.json` that Detectron2's `JSONWriter` writes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from efficient_detr.errors import UserError
from efficient_detr.visualization.figures import FAINT, INK, save_figure

__all__ = ["curves_figure", "read_metrics", "save_curves"]

Series = list[tuple[int, float]]  # (iteration, value), ascending

_AP_NAMES = {"bbox/AP": "AP", "bbox/AP50": "AP50", "bbox/AP75": "AP75"}


def read_metrics(path: str | os.PathLike[str]) -> dict[str, Series]:
    """Read the scalars of a training run.

    Of a resumed run, whose iterations occur more than once, the last record of each counts.

    Args:
        path: a `metrics.json`: one JSON object a line.

    Returns:
        For each scalar its values by ascending iteration; infinities and NaN are left out.

    Raises:
        UserError: the file is missing, or a line other than the last one, which a running
            training may still be writing, is no JSON object with an iteration.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): train first.") from error
    values: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            iteration = int(record["iteration"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"Line {number} of {path} is not a record of a training run: delete that line."
            ) from error
        for name, value in record.items():
            if name != "iteration" and _is_finite(value):
                values.setdefault(name, {})[iteration] = float(value)
    return {name: sorted(series.items()) for name, series in values.items()}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def curves_figure(metrics: dict[str, Series]) -> Figure:
    """Make a figure of the loss, the average precision and the learning rate by iteration.

    Args:
        metrics: from `read_metrics`; a panel whose scalars are absent says so.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(11, 3.4), facecolor="white", layout="constrained")
    loss, precision, rate = figure.subplots(1, 3)
    _plot(loss, metrics, {"total_loss": "total loss"}, "Training loss")
    loss.set_ylim(bottom=0)
    _plot(precision, metrics, _AP_NAMES, "Validation, average precision (%)")
    precision.set_ylim(0, 100)
    precision.set_xlim(left=0)
    _plot(rate, metrics, {"lr": "learning rate"}, "Learning rate")
    rate.set_ylim(bottom=0)
    return figure


def _plot(axis: Axes, metrics: dict[str, Series], names: dict[str, str], title: str) -> None:
    """Plot some scalars into one panel."""
    axis.set_title(title, fontsize=10, color=INK, fontweight="bold")
    axis.set_xlabel("iteration", fontsize=9, color=FAINT)
    axis.tick_params(labelsize=8, colors=FAINT)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    present = [name for name in names if metrics.get(name)]
    for name in present:
        iterations, values = zip(*metrics[name], strict=True)
        # A dot for each value only where they are few: a single evaluation draws no line.
        marker = "o" if len(values) <= 30 else ""
        label = f"{names[name]} ({values[-1]:.3g})"
        axis.plot(iterations, values, marker=marker, markersize=4, linewidth=1.6, label=label)
    if present:
        axis.legend(fontsize=8, frameon=False)
    else:
        text = axis.text(0.5, 0.5, "no values", ha="center", transform=axis.transAxes)
        text.set(fontsize=9, color=FAINT)


def save_curves(metrics_file: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write the curves of a training run as PNG.

    Args:
        metrics_file: the run's `metrics.json`.
        path: file to write.

    Returns:
        The path.

    Raises:
        UserError: the metrics cannot be read.
    """
    return save_figure(curves_figure(read_metrics(metrics_file)), path)
