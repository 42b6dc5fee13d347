"""Pictures of the model zoo: accuracy by cost, and cost of encoders by image size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from efficient_detr.visualization.figures import FAINT, INK, class_colours
from tools.model_zoo.measured import Size

# Families differ in shape, too, so that points of nearly the same place can be told apart.
_MARKERS = "os^Dv"

# Where a label may stand: offset from its point, as (x, y) in points.
_PLACES = [
    *[(7, 0), (6, 8), (6, -8), (-7, 0), (-6, 8), (-6, -8), (0, 11), (0, -11)],
    *[(8, 18), (8, -18), (-8, 18), (-8, -18), (0, 22), (0, -22)],
]


@dataclass(frozen=True)
class Point:
    """A model in the picture of accuracy.

    Attributes:
        label: shown beside it.
        family: decides its colour.
        gflops: measured.
        precision: AP in percent, quoted.
        origin: label of the model from which an arrow leads here, or "".
        provisional: whether trained weights would cost something else; drawn hollow.
    """

    label: str
    family: str
    gflops: float
    precision: float
    origin: str = ""
    provisional: bool = False


def accuracy_figure(points: Sequence[Point], *, size: Size) -> Figure:
    """AP against GFLOPs, with an arrow from a model to one that makes its attention cheaper.

    Args:
        points: in any order.
        size: of the image for which GFLOPs were counted.

    Returns:
        The figure; GFLOPs grow by factors.
    """
    figure = Figure(figsize=(10, 6), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    families = list(dict.fromkeys(point.family for point in points))
    colours = dict(zip(families, class_colours(len(families)), strict=True))
    places = {point.label: (point.gflops, point.precision) for point in points}
    for point in points:
        if point.origin in places:
            arrow = {"arrowstyle": "->", "color": FAINT, "alpha": 0.6, "shrinkA": 4, "shrinkB": 4}
            place = places[point.label]
            axis.annotate("", place, xytext=places[point.origin], arrowprops=arrow)
    markers = dict(zip(families, itertools.cycle(_MARKERS)))
    for point in points:
        colour, marker = colours[point.family], markers[point.family]
        # Clear enough to show another point below.
        face = "white" if point.provisional else (*colour, 0.5)
        place = places[point.label]
        axis.scatter(*place, s=30, marker=marker, color=[face], edgecolors=[colour], zorder=3)
    for family, colour in colours.items():
        axis.scatter([], [], s=30, marker=markers[family], color=[colour], label=family)
    if any(point.provisional for point in points):
        axis.scatter([], [], s=30, color="white", edgecolors=[INK], label="hollow: random weights")
    _style(axis, "Accuracy against cost", f"GFLOPs at {size[0]} x {size[1]}, measured")
    axis.set_ylabel("AP on COCO val2017 (%), quoted", fontsize=9, color=FAINT)
    axis.set_xscale("log")
    _plain_ticks(axis)
    axis.margins(0.09, 0.07)
    axis.legend(fontsize=9, frameon=False, loc="lower right")
    _label(axis, points, places, figure)
    return figure


def _label(
    axis: Axes, points: Sequence[Point], places: Mapping[str, tuple[float, float]], figure: Figure
) -> None:
    """Write each label where it covers least of other labels, points and arrows."""
    figure.draw_without_rendering()
    taken = [_around(axis, place) for place in places.values()]
    arrows = [
        box
        for point in points
        if point.origin in places
        for box in _along(axis, places[point.origin], places[point.label])
    ]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    inside = axis.get_window_extent(renderer)
    # From above, so that labels of close points have the order of these.
    for point in sorted(points, key=lambda point: -point.precision):
        place = places[point.label]
        text = axis.annotate(point.label, place, xytext=(0, 0), textcoords="offset points")
        text.set(fontsize=8, color=INK, zorder=4)

        def cost(offset: tuple[int, int], text: Annotation = text) -> float:
            _place(text, offset)
            box = text.get_window_extent(renderer)
            outside = 0 if _within(box, inside) else 1e6
            # Better across an arrow than far from the point.
            distance = 3 * math.hypot(*offset)
            return outside + _covered(box, taken) + 0.3 * _covered(box, arrows) + distance

        _place(text, min(_PLACES, key=cost))
        taken.append(text.get_window_extent(renderer))


def _place(text: Annotation, offset: tuple[int, int]) -> None:
    x, y = offset
    text.set_position(offset)
    text.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")
    text.set_verticalalignment("center_baseline")


def _around(axis: Axes, place: tuple[float, float], radius: float = 5) -> Bbox:
    """The pixels that a point covers."""
    x, y = axis.transData.transform(place)
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _along(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> list[Bbox]:
    """Small pieces of the pixels that an arrow covers."""
    (x0, y0), (x1, y1) = axis.transData.transform([start, end])
    steps = [(step + 0.5) / 20 for step in range(20)]
    places = [(x0 + (x1 - x0) * step, y0 + (y1 - y0) * step) for step in steps]
    return [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for x, y in places]


def _covered(box: Bbox, others: Sequence[Bbox]) -> float:
    """Area of a box that others cover, in square pixels."""
    common = [Bbox.intersection(box, other) for other in others]
    return sum(one.width * one.height for one in common if one is not None)


def _within(box: Bbox, outer: Bbox) -> bool:
    return bool(
        outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1
    )


@dataclass(frozen=True)
class EncoderCurve:
    """Cost of one model's encoder, with its selection of tokens, by image size.

    Attributes:
        label: kind of attention and model.
        gflops: measured, by image size.
        milliseconds: latency, measured, by image size.
    """

    label: str
    gflops: dict[Size, float]
    milliseconds: dict[Size, float]


def encoder_figure(curves: Sequence[EncoderCurve], *, clock: str) -> Figure:
    """GFLOPs and latency of encoders against the number of pixels, both by factors.

    Args:
        curves: one for each model.
        clock: what was measured as latency.

    Returns:
        The figure; a panel without numbers says so.
    """
    figure = Figure(figsize=(11, 4.8), facecolor="white", layout="constrained")
    cost, latency = figure.subplots(1, 2)
    colours = class_colours(len(curves))
    for curve, colour in zip(curves, colours, strict=True):
        _plot(cost, curve.label, curve.gflops, colour)
        _plot(latency, curve.label, curve.milliseconds, colour)
    _style(cost, "Multiply-adds of the encoder", "image size")
    cost.set_ylabel("GFLOPs, measured", fontsize=9, color=FAINT)
    _style(latency, "Time of the encoder", "image size")
    latency.set_ylabel(f"{clock} (ms), measured", fontsize=9, color=FAINT)
    for axis, values in (
        (cost, [curve.gflops for curve in curves]),
        (latency, [curve.milliseconds for curve in curves]),
    ):
        _size_axis(axis, sorted({size for one in values for size in one}))
    if cost.lines:
        figure.legend(
            *cost.get_legend_handles_labels(),
            fontsize=8,
            frameon=False,
            ncols=3,
            loc="outside lower center",
        )
    return figure


def _plot(
    axis: Axes, label: str, values: Mapping[Size, float], colour: tuple[float, float, float]
) -> None:
    if values:
        sizes = sorted(values, key=_pixels)
        axis.plot(
            [_pixels(size) for size in sizes],
            [values[size] for size in sizes],
            *("o-",),
            color=colour,
            label=label,
            linewidth=1.6,
            markersize=4,
        )


def _size_axis(axis: Axes, sizes: Sequence[Size]) -> None:
    """Logarithmic axes, with the sizes themselves below."""
    if not sizes:
        text = axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        text.set(fontsize=9, color=FAINT)
        axis.set(xticks=[], yticks=[])
        return
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain_ticks(axis)
    axis.set_xticks([_pixels(size) for size in sizes])
    axis.set_xticklabels([f"{height} x {width}" for height, width in sizes])
    axis.xaxis.set_minor_locator(NullLocator())


def _pixels(size: Size) -> int:
    return size[0] * size[1]


def _plain_ticks(axis: Axes) -> None:
    """Numbers instead of powers of ten."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for each in (axis.xaxis, axis.yaxis):
        if each.get_scale() == "log":
            each.set_major_formatter(plain)
            each.set_minor_formatter(plain)


def _style(axis: Axes, title: str, x_label: str) -> None:
    axis.set_title(title, fontsize=10, color=INK, fontweight="bold")
    axis.set_xlabel(x_label, fontsize=9, color=FAINT)
    axis.tick_params(labelsize=8, colors=FAINT, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, which="both")
