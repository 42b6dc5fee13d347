"""Where the deformable attention of DAT samples its keys, drawn over the image.

The first panel connects every point of the reference grid with the deformed points of the groups.
Each further panel shows one query: a star marks it, and points grow and brighten with the attention
that they get from it (as figures 1 and 6 of arXiv 2201.00520 do).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from efficient_detr.visualization.figures import (
    Image,
    class_colours,
    enlarge,
    image_grid,
    save_figure,
    show_image,
)

__all__ = ["AttendedPoints", "SamplingExample", "sampling_points_figure", "save_sampling_points"]

_LONGER_SIDE = 640
_PANEL_INCHES = 4.4


@dataclass(frozen=True)
class AttendedPoints:
    """What one query attends to.

    Attributes:
        position: (2,) middle (x, y) of the query's cell, in pixels of the image.
        weights: (G, M) attention weights of the keys of each shown group, 0 to 1.
    """

    position: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class SamplingExample:
    """The sampling points of one block on one image.

    Attributes:
        image: network input without padding, RGB uint8 (height, width, 3).
        title: which block.
        groups: indices of the G shown groups.
        map_shape: (H_k, W_k) of the keys; M = H_k W_k.
        references: (M, 2) points (x, y) of the reference grid, in pixels of the image.
        points: (G, M, 2) deformed points (x, y), in pixels of the image.
        attended: one for each query.
        weights_of: what the weights are the mean of, or which head's they are.
    """

    image: Image
    title: str
    groups: tuple[int, ...]
    map_shape: tuple[int, int]
    references: NDArray[np.float64]
    points: NDArray[np.float64]
    attended: tuple[AttendedPoints, ...]
    weights_of: str


def sampling_points_figure(examples: Sequence[SamplingExample]) -> Figure:
    """Make a figure with a row for each example: its points, then its queries.

    Args:
        examples: what to show, at least one; all with the same number of queries.

    Returns:
        The figure.
    """
    figure, axes = image_grid(
        len(examples),
        [1.0] * (1 + len(examples[0].attended)),
        title="Sampling points of deformable attention",
        cell=(_PANEL_INCHES, _PANEL_INCHES * max(_height(one) for one in examples) + 0.5),
    )
    for row, example in zip(axes, examples, strict=True):
        _show_points(row[0], example)
        for axis, attended in zip(row[1:], example.attended, strict=True):
            _show_query(axis, example, attended)
    return figure


def _show_points(axis: Axes, example: SamplingExample) -> None:
    """Show the reference grid and lines from it to the points of each group."""
    height, width = example.map_shape
    shown = len(example.groups)
    note = f"{height} x {width} keys; white: reference grid; "
    note += f"group {example.groups[0]}" if shown == 1 else f"a colour for each of {shown} groups"
    _show(axis, example, example.title, note)
    factor, dot = _enlargement(example), _dot_size(example)
    references = factor * example.references
    for colour, points in zip(class_colours(shown), factor * example.points, strict=True):
        lines = LineCollection(
            list(np.stack([references, points], axis=1)),
            colors=[colour],
            linewidths=float(np.clip(dot / 3, 0.3, 1.2)),
        )
        axis.add_collection(lines, autolim=False)
        dots = axis.scatter(
            points[:, 0], points[:, 1], s=dot**2, color=[colour], linewidths=0, zorder=3
        )
        for artist in (lines, dots):
            _clip(artist, axis, example)
    grid = axis.scatter(
        references[:, 0],
        references[:, 1],
        s=(0.6 * dot) ** 2,
        color="white",
        edgecolors="black",
        linewidths=0.2,
    )
    _clip(grid, axis, example)


def _show_query(axis: Axes, example: SamplingExample, attended: AttendedPoints) -> None:
    """Show a query, and the points by the attention that they get from it."""
    factor = _enlargement(example)
    highest = float(attended.weights.max())
    note = f"{example.weights_of}: up to {highest:.2g}, mean {attended.weights.mean():.2g}"
    _show(axis, example, "attention of a query", note)
    weights = attended.weights.ravel() / max(highest, np.finfo(np.float64).tiny)
    order = np.argsort(weights, kind="stable")  # the largest on top
    points = factor * example.points.reshape(-1, 2)[order]
    sizes = _dot_size(example) ** 2 * (0.3 + 5 * weights[order] ** 2)
    dots = axis.scatter(
        points[:, 0],
        points[:, 1],
        s=sizes,
        c=weights[order],
        cmap="plasma",
        vmin=0,
        vmax=1,
        linewidths=0,
        alpha=0.8,
    )
    _clip(dots, axis, example)
    x, y = factor * attended.position
    star = axis.scatter([x], [y], marker="*", s=170, color="white", zorder=4)
    star.set(edgecolor="black", linewidth=1.0, clip_on=False)


def _show(axis: Axes, example: SamplingExample, title: str, note: str) -> None:
    """Show the image without blank space above and below it."""
    picture = enlarge(example.image, _LONGER_SIDE)
    show_image(axis, picture, title=title, note=note)
    if _height(example) < 1:
        axis.set_ylim(picture.shape[0], 0)


def _height(example: SamplingExample) -> float:
    """Height of a panel as a part of its width."""
    height, width = example.image.shape[:2]
    return min(height / width, 1.0)


def _enlargement(example: SamplingExample) -> float:
    """Pixels of the drawn picture for each pixel of the image."""
    return _LONGER_SIDE / max(example.image.shape[:2])


def _dot_size(example: SamplingExample) -> float:
    """Diameter of a dot in points (1/72 inch): a quarter of the way between two keys."""
    spans = np.ptp(example.references, axis=0) / np.maximum(
        np.array(example.map_shape[::-1]) - 1, 1
    )
    spacing = float(spans[spans > 0].min(initial=np.inf))
    inches = _PANEL_INCHES * spacing / max(example.image.shape[:2])
    return float(np.clip(72 * inches / 4, 1.0, 5.0))


def _clip(artist: Artist, axis: Axes, example: SamplingExample) -> None:
    """Hide what lies outside the image, in its padding."""
    height, width = _enlargement(example) * np.array(example.image.shape[:2])
    artist.set_clip_path(Rectangle((0, 0), width, height, transform=axis.transData))


def save_sampling_points(examples: Sequence[SamplingExample], path: str | os.PathLike[str]) -> Path:
    """Write the picture of the sampling points as PNG; returns the path."""
    return save_figure(sampling_points_figure(examples), path)
