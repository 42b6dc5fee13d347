"""What the pictures share: one look, class colours, and files that are complete or absent.

Figures are made through matplotlib's object interface, so that drawing one changes no global state
and needs no display.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from efficient_detr.files import replaced_file

__all__ = ["Image", "class_colours", "enlarge", "image_grid", "save_figure", "show_image"]

Image = NDArray[np.uint8]  # (height, width, 3), RGB
Colour = tuple[float, float, float]  # red, green, blue from 0 to 1

INK = "#20262e"
FAINT = "#66707a"

_GOLDEN_RATIO = 0.618033988749895


def class_colours(num_classes: int) -> list[Colour]:
    """Return one bright colour per class; the colours of the first classes differ most.

    Args:
        num_classes: number of classes, K.

    Returns:
        K colours (red, green, blue), each from 0 to 1.
    """
    hues = [(0.56 + index * _GOLDEN_RATIO) % 1.0 for index in range(num_classes)]
    # Two alternating brightnesses keep neighbours apart when the hues get close.
    return [
        colorsys.hsv_to_rgb(hue, 0.72, 1.0 if index % 2 == 0 else 0.88)
        for index, hue in enumerate(hues)
    ]


def enlarge(image: Image, longer_side: int) -> Image:
    """Resize an RGB image so that its longer side has `longer_side` pixels."""
    height, width = image.shape[:2]
    scale = longer_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    interpolation = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    return cv2.resize(image, size, interpolation=interpolation).astype(np.uint8)


def image_grid(
    rows: int,
    widths: Sequence[float],
    *,
    title: str,
    cell: tuple[float, float] = (2.2, 2.45),
    footer: float = 0.0,
) -> tuple[Figure, NDArray[Any]]:
    """Make an empty figure with a grid of cells.

    Args:
        rows: number of rows.
        widths: width of each column, in cells; a narrow column makes a gap.
        title: heading of the figure.
        cell: width and height of a cell in inches.
        footer: additional height in inches.

    Returns:
        The figure, and its axes as an array (rows, columns).
    """
    size = (sum(widths) * cell[0], rows * cell[1] + 0.4 + footer)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=12, color=INK, fontweight="bold")
    axes = figure.subplots(
        rows, len(widths), squeeze=False, gridspec_kw={"width_ratios": list(widths)}
    )
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def show_image(axis: Axes, image: Image, *, title: str = "", note: str = "") -> None:
    """Show an image in the middle of a square, with a title above and a note below it."""
    height, width = image.shape[:2]
    half = max(height, width) / 2
    axis.imshow(image, interpolation="nearest", extent=(0, width, height, 0))
    axis.set_xlim(width / 2 - half, width / 2 + half)
    axis.set_ylim(height / 2 + half, height / 2 - half)
    axis.set_title(title, fontsize=9, color=INK)
    if note:
        text = axis.text(0.5, -0.03, note, ha="center", va="top", transform=axis.transAxes)
        text.set(fontsize=8, color=FAINT)


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 120) -> Path:
    """Write a figure as PNG; an interrupted writer leaves no half picture behind.

    Args:
        figure: the figure.
        path: file to write; its folder is made if need be.
        dpi: pixels per inch.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as partial_path:
        figure.savefig(partial_path, format="png", dpi=dpi)
    return path
