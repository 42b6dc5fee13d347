"""Drawing boxes, labels and masks on images with matplotlib."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from enum import Enum, unique
from typing import Any

import cv2
import matplotlib.colors as mplc
import numpy as np
import pycocotools.mask as mask_util
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from .colormap import random_color

__all__ = ["ColorMode", "VisImage", "Visualizer"]


@unique
class ColorMode(Enum):
    """How objects are coloured."""

    IMAGE = 0  # a random colour for each object
    SEGMENTATION = 1  # similar colours for objects of one class (metadata ``thing_colors``)
    IMAGE_BW = 2  # random colours; the image is grey outside predicted masks


class VisImage:
    """A figure of the size of an image times ``scale``; ``ax`` draws in the image's pixels."""

    def __init__(self, img: np.ndarray, scale: float = 1.0) -> None:
        """Start from an RGB image (H, W, 3) in 0 ... 255."""
        self.img = img
        self.scale = scale
        self.height, self.width = img.shape[:2]
        self.fig = Figure(frameon=False)
        self.dpi = self.fig.get_dpi()
        # matplotlib rounds sizes down: a hundredth of a pixel keeps the last row and column
        size = ((side * scale + 1e-2) / self.dpi for side in (self.width, self.height))
        self.fig.set_size_inches(*size)
        self.canvas = FigureCanvasAgg(self.fig)
        self.ax = self.fig.add_axes((0.0, 0.0, 1.0, 1.0))
        self.ax.axis("off")
        self.reset_image(img)

    def reset_image(self, img: np.ndarray) -> None:
        """Put another image of the same size behind everything drawn later."""
        extent = (0, self.width, self.height, 0)
        self.ax.imshow(img.astype(np.uint8), extent=extent, interpolation="nearest")

    def save(self, filepath: str) -> None:
        """Write the drawing; the name's suffix chooses the format."""
        self.fig.savefig(filepath)

    def get_image(self) -> np.ndarray:
        """The drawing as uint8 RGB (H * scale, W * scale, 3)."""
        buffer, (width, height) = self.canvas.print_to_buffer()
        return np.frombuffer(buffer, dtype=np.uint8).reshape(height, width, 4)[:, :, :3].copy()


class Visualizer:
    """Draws annotations or predictions of one image."""

    def __init__(
        self,
        img_rgb: np.ndarray,
        metadata: Any = None,
        scale: float = 1.0,
        instance_mode: ColorMode = ColorMode.IMAGE,
        font_size_scale: float = 1.0,
    ) -> None:
        """Start a drawing.

        Args:
            img_rgb: RGB (H, W, 3) in 0 ... 255.
            metadata: of the dataset, for ``thing_classes`` and ``thing_colors``.
            scale: size of the drawing relative to the image.
            instance_mode: see :class:`ColorMode`.
            font_size_scale: enlarges all text.
        """
        self.img = np.asarray(img_rgb).clip(0, 255).astype(np.uint8)
        self.metadata = MetadataCatalog.get("__nonexist__") if metadata is None else metadata
        self.output = VisImage(self.img, scale=scale)
        self._side = float(np.sqrt(self.output.height * self.output.width))
        self._default_font_size = max(self._side // 90, 10 // scale) * font_size_scale
        self._instance_mode = instance_mode

    def draw_instance_predictions(
        self, predictions: Instances, jittering: bool = True
    ) -> VisImage:
        """Draw ``pred_boxes``, ``pred_classes``, ``scores`` and ``pred_masks``, where present.

        Args:
            predictions: of one image, on the CPU.
            jittering: vary the colours within a class, in mode ``SEGMENTATION``.
        """
        fields = predictions.get_fields()
        classes = fields["pred_classes"].tolist() if "pred_classes" in fields else None
        masks = np.asarray(fields["pred_masks"]) if "pred_masks" in fields else None
        alpha, colors = 0.5, self._class_colors(classes, jittering)
        if colors is not None:
            alpha = 0.8
        if self._instance_mode == ColorMode.IMAGE_BW:
            alpha = 0.3
            grey = self.img.mean(axis=2, keepdims=True, dtype=np.float32).repeat(3, axis=2)
            if masks is not None and len(masks):
                covered = masks.any(axis=0)
                grey[covered] = self.img[covered]
            self.output.reset_image(grey)
        return self.overlay_instances(
            boxes=fields.get("pred_boxes"),
            labels=self._labels(classes, fields.get("scores")),
            masks=masks,
            assigned_colors=colors,
            alpha=alpha,
        )

    def draw_dataset_dict(self, dic: Mapping[str, Any]) -> VisImage:
        """Draw the ``annotations`` of an entry of a dataset: boxes, classes, segmentations."""
        objects = dic.get("annotations")
        if not objects:
            return self.output
        classes = [obj["category_id"] for obj in objects]
        labels = self._labels(classes, None) or []
        crowd = ["|crowd" if obj.get("iscrowd", 0) else "" for obj in objects]
        masks = [o["segmentation"] for o in objects] if "segmentation" in objects[0] else None
        return self.overlay_instances(
            boxes=[BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects],
            labels=[label + mark for label, mark in zip(labels, crowd)],
            masks=masks,
            assigned_colors=self._class_colors(classes, jittering=True),
        )

    def _labels(self, classes: Sequence[int] | None, scores: Any) -> list[str] | None:
        names = self.metadata.get("thing_classes")
        labels = None
        if classes is not None:
            labels = [names[number] if names else str(number) for number in classes]
        if scores is not None:
            percents = [f"{float(score) * 100:.0f}%" for score in scores]
            labels = [f"{a} {b}" for a, b in zip(labels, percents)] if labels else percents
        return labels

    def _class_colors(self, classes: Sequence[int] | None, jittering: bool) -> list[Any] | None:
        table = self.metadata.get("thing_colors")
        if self._instance_mode != ColorMode.SEGMENTATION or not table or classes is None:
            return None
        colors = [np.array(table[number]) / 255 for number in classes]
        return [self._jitter(color) for color in colors] if jittering else colors

    @staticmethod
    def _jitter(color: np.ndarray) -> np.ndarray:
        """Another colour at distance 0.5 in a random direction of the RGB cube."""
        shift = np.random.rand(3)
        return np.clip(shift / np.linalg.norm(shift) * 0.5 + color, 0, 1)

    def overlay_instances(
        self,
        *,
        boxes: Any = None,
        labels: Sequence[str] | None = None,
        masks: Any = None,
        assigned_colors: Sequence[Any] | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draw objects, large ones first.

        Args:
            boxes: Boxes, or (T, 4) as (x0, y0, x1, y1).
            labels: a text for each object.
            masks: for each object polygons, a run-length encoded mask, or a binary mask (H, W).
            assigned_colors: a colour for each object; default random ones.
            alpha: opacity of masks.
        """
        if boxes is not None:
            boxes = boxes.tensor.detach().numpy() if isinstance(boxes, Boxes) else np.asarray(boxes)
        contours = None if masks is None else [self._contours(mask) for mask in masks]
        lengths = {len(part) for part in (boxes, labels, contours) if part is not None}
        assert len(lengths) <= 1, f"boxes, labels and masks are of lengths {sorted(lengths)}"
        number = max(lengths, default=0)
        colors = assigned_colors
        if colors is None:
            colors = [random_color(rgb=True, maximum=1) for _ in range(number)]
        if boxes is None and contours is not None:
            boxes_of_masks = [_bounding_box(polygons) for polygons in contours]
        order = np.arange(number)
        if number and (boxes is not None or contours is not None):
            extents = np.asarray(boxes if boxes is not None else boxes_of_masks)
            order = np.argsort(-np.prod(extents[:, 2:4] - extents[:, :2], axis=1))
        for index in order if number else ():
            if boxes is not None:
                self.draw_box(boxes[index], edge_color=colors[index])
            for polygon in contours[index] if contours is not None else ():
                self.draw_polygon(polygon, colors[index], alpha=alpha)
            if labels is not None and (boxes is not None or contours is not None):
                self._draw_label(labels[index], extents[index], colors[index])
        return self.output

    def _contours(self, mask: Any) -> list[np.ndarray]:
        """Outlines (points, 2) of a mask in any of its representations."""
        if isinstance(mask, list):
            return [np.asarray(polygon).reshape(-1, 2) for polygon in mask]
        if isinstance(mask, dict):
            if isinstance(mask["counts"], list):
                mask = mask_util.frPyObjects(mask, *mask["size"])
            mask = mask_util.decode(mask)
        bitmap = np.ascontiguousarray(
            mask.numpy() if isinstance(mask, torch.Tensor) else mask, dtype=np.uint8
        )
        expected = (self.output.height, self.output.width)
        assert bitmap.shape == expected, f"a mask is {bitmap.shape}, the image {expected}"
        found = cv2.findContours(bitmap, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
        return [points.reshape(-1, 2) + 0.5 for points in found if len(points) >= 3]

    def _draw_label(self, text: str, box: np.ndarray, color: Any) -> None:
        """Write at the top-left corner of a box, or below it where the box is small."""
        x0, y0, x1, y1 = box
        scale = self.output.scale
        position = (x0, y0)
        if (y1 - y0) * (x1 - x0) < 1000 * scale or y1 - y0 < 40 * scale:
            position = (x1, y0) if y1 >= self.output.height - 5 else (x0, y1)
        growth = np.clip(((y1 - y0) / self._side - 0.02) / 0.08 + 1, 1.2, 2)
        self.draw_text(
            text,
            position,
            color=_lighten(color, 0.7),
            horizontal_alignment="left",
            font_size=growth * 0.5 * self._default_font_size,
        )

    def draw_text(
        self,
        text: str,
        position: tuple[float, float],
        *,
        font_size: float | None = None,
        color: Any = "g",
        horizontal_alignment: str = "center",
        rotation: float = 0,
    ) -> VisImage:
        """Write ``text`` below ``position`` (x, y) on a dark ground."""
        bright = np.maximum(mplc.to_rgb(color), 0.2)
        bright[np.argmax(bright)] = max(0.8, np.max(bright))
        self.output.ax.text(
            *position,
            text,
            size=(font_size or self._default_font_size) * self.output.scale,
            family="sans-serif",
            bbox={"facecolor": "black", "alpha": 0.8, "pad": 0.7, "edgecolor": "none"},
            verticalalignment="top",
            horizontalalignment=horizontal_alignment,
            color=bright,
            zorder=10,
            rotation=rotation,
        )
        return self.output

    def draw_box(
        self, box_coord: Any, alpha: float = 0.5, edge_color: Any = "g", line_style: str = "-"
    ) -> VisImage:
        """Draw the outline of a box (x0, y0, x1, y1)."""
        x0, y0, x1, y1 = box_coord
        width = max(self._default_font_size / 4, 1) * self.output.scale
        self.output.ax.add_patch(
            Rectangle(
                (x0, y0),
                x1 - x0,
                y1 - y0,
                fill=False,
                edgecolor=edge_color,
                linewidth=width,
                alpha=alpha,
                linestyle=line_style,
            )
        )
        return self.output

    def draw_polygon(
        self, segment: np.ndarray, color: Any, edge_color: Any = None, alpha: float = 0.5
    ) -> VisImage:
        """Fill a polygon (points, 2); the default edge is darker where the filling is opaque."""
        if edge_color is None:
            edge_color = _lighten(color, -0.7) if alpha > 0.8 else color
        self.output.ax.add_patch(
            Polygon(
                segment,
                fill=True,
                facecolor=(*mplc.to_rgb(color), alpha),
                edgecolor=(*mplc.to_rgb(edge_color), 1),
                linewidth=max(self._default_font_size // 15 * self.output.scale, 1),
            )
        )
        return self.output

    def get_output(self) -> VisImage:
        """The drawing so far."""
        return self.output


def _bounding_box(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """(x0, y0, x1, y1) around polygons (points, 2); zeros where there are none."""
    if not polygons:
        return np.zeros(4)
    points = np.concatenate(polygons)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def _lighten(color: Any, amount: float) -> tuple[float, float, float]:
    """A colour whose lightness grew by the factor ``1 + amount``, amount in [-1, 1]."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*mplc.to_rgb(color))
    return colorsys.hls_to_rgb(hue, min(max(lightness * (1 + amount), 0.0), 1.0), saturation)
