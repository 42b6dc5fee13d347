"""Predictions beside the ground truth, for several images in one picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from numpy.typing import NDArray

from efficient_detr.visualization.figures import (
    Image,
    class_colours,
    enlarge,
    image_grid,
    save_figure,
    show_image,
)

__all__ = [
    "DetectionExample",
    "detection_example",
    "draw_boxes",
    "predictions_figure",
    "save_predictions",
]

Boxes = NDArray[np.float64]  # (N, 4) as (x0, y0, x1, y1) in pixels


@dataclass(frozen=True)
class DetectionExample:
    """An image with its ground truth and what a detector predicts.

    Attributes:
        image: RGB uint8 (height, width, 3).
        true_boxes: (T, 4) boxes (x0, y0, x1, y1) in pixels of the image.
        true_classes: (T,) class indices.
        boxes: (N, 4) predicted boxes, likewise.
        classes: (N,) predicted class indices.
        scores: (N,) scores, 0 to 1.
        name: what to call the image.
    """

    image: Image
    true_boxes: Boxes
    true_classes: NDArray[np.int64]
    boxes: Boxes
    classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    name: str = ""


def detection_example(record: Mapping[str, Any], instances: Instances) -> DetectionExample:
    """Combine a data set's record with the model's prediction for it.

    Args:
        record: Detectron2's dict of an image, with `file_name` and `annotations`.
        instances: `model(...)[i]["instances"]`, in pixels of the image file.

    Returns:
        The example; crowd annotations are left out.
    """
    objects = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    true_boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    instances = instances.to("cpu")
    return DetectionExample(
        image=np.ascontiguousarray(read_image(record["file_name"], format="RGB")),
        true_boxes=np.asarray(true_boxes, dtype=np.float64).reshape(-1, 4),
        true_classes=np.asarray([a["category_id"] for a in objects], dtype=np.int64),
        boxes=instances.pred_boxes.tensor.detach().double().numpy().reshape(-1, 4),
        classes=instances.pred_classes.numpy(),
        scores=instances.scores.detach().double().numpy(),
        name=Path(record["file_name"]).stem,
    )


def draw_boxes(
    image: Image,
    boxes: Boxes,
    classes: Sequence[int] | NDArray[np.int64],
    class_names: Sequence[str],
    scores: Sequence[float] | NDArray[np.float64] | None = None,
    *,
    longer_side: int = 360,
) -> Image:
    """Draw labelled boxes over an enlarged image, one colour a class.

    Args:
        image: RGB uint8 (height, width, 3).
        boxes: (N, 4) boxes (x0, y0, x1, y1) in pixels of the image.
        classes: (N,) class indices.
        class_names: name of every class.
        scores: (N,) scores to write behind the class, 0 to 1; None for ground truth.
        longer_side: longer side of the result, in pixels.

    Returns:
        RGB uint8; its longer side has `longer_side` pixels.
    """
    canvas = enlarge(image, longer_side)
    factors = np.tile([canvas.shape[1] / image.shape[1], canvas.shape[0] / image.shape[0]], 2)
    colours = class_colours(len(class_names))
    visualizer = Visualizer(canvas)
    labels = [class_names[int(index)] for index in classes]
    if scores is not None:
        labels = [f"{label} {score:.0%}" for label, score in zip(labels, scores, strict=True)]
    boxes = np.asarray(boxes) * factors
    for box, index in zip(boxes, classes, strict=True):
        visualizer.draw_box(box, alpha=1.0, edge_color=colours[int(index)])
    for box, label, index in zip(boxes, labels, classes, strict=True):
        # Labels come last, so that no box runs through them, and stay inside the picture.
        room = (canvas.shape[1] - 13.0 * len(label), canvas.shape[0] - 22.0)
        position = (max(0.0, min(box[0], room[0])), max(0.0, min(box[1], room[1])))
        visualizer.draw_text(
            label,
            position,
            font_size=15,
            color=colours[int(index)],
            horizontal_alignment="left",
        )
    return visualizer.get_output().get_image()


def predictions_figure(
    examples: Sequence[DetectionExample],
    class_names: Sequence[str],
    *,
    score_threshold: float = 0.5,
    columns: int = 3,
) -> Figure:
    """Make a figure of image pairs: ground truth on the left, predictions on the right.

    Args:
        examples: what to show, at least one.
        class_names: name of every class.
        score_threshold: predictions below this score are not drawn.
        columns: number of pairs side by side.

    Returns:
        The figure.
    """
    columns = min(columns, len(examples))
    rows = -(-len(examples) // columns)
    title = f"Ground truth and predictions (score of at least {score_threshold:.0%})"
    widths = [1.0, 1.0, 0.06] * columns
    figure, axes = image_grid(rows, widths[:-1], title=title)
    for index, example in enumerate(examples):
        row, column = divmod(index, columns)
        left, right = axes[row, 3 * column], axes[row, 3 * column + 1]
        shown = example.scores >= score_threshold
        truth = draw_boxes(example.image, example.true_boxes, example.true_classes, class_names)
        prediction = draw_boxes(
            example.image,
            example.boxes[shown],
            example.classes[shown],
            class_names,
            example.scores[shown],
        )
        show_image(left, truth, title=f"{example.name}  ground truth".strip())
        show_image(right, prediction, title="prediction")
    return figure


def save_predictions(
    examples: Sequence[DetectionExample],
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    score_threshold: float = 0.5,
) -> Path:
    """Write the picture of predictions beside the ground truth as PNG; returns the path."""
    figure = predictions_figure(examples, class_names, score_threshold=score_threshold)
    return save_figure(figure, path)
