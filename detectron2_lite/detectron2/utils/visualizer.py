"""Drawing boxes, labels and masks on images with matplotlib."""

import colorsys
from collections.abc import Mapping, Sequence
from enum import Enum, unique
from typing import Any

import cv2
import matplotlib.colors as mplc
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from .colormap import random_color


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
        width, height = ((side * scale + 1e-2) / self.dpi for side in (self.width, self.height))
        self.fig.set_size_inches(width, height)
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
        """Start from an RGB image (H, W, 3) in 0 ... 255.

        ``metadata`` of the dataset give ``thing_classes`` and ``thing_colors``; ``scale`` is the
        size of the drawing relative to the image.
        """
        self.img = np.asarray(img_rgb).clip(0, 255).astype(np.uint8)
        self.metadata = MetadataCatalog.get("__nonexist__") if metadata is None else metadata
        self.output = VisImage(self.img, scale=scale)
        self._side = float(np.sqrt(self.output.height * self.output.width))
        self._default_font_size = max(self._side // 90, 10 // scale) * font_size_scale
        self._instance_mode = instance_mode

    def draw_instance_predictions(self, predictions: Instances, jittering: bool = True) -> VisImage:
        """Draw ``pred_boxes``, ``pred_classes``, ``scores`` and ``pred_masks``, where present.

        ``jittering`` varies the colours within a class, in mode ``SEGMENTATION``.
        """
        fields = predictions.get_fields()
        classes = fields["pred_classes"].tolist() if "pred_classes" in fields else None
        masks: Any = np.asarray(fields["pred_masks"]) if "pred_masks" in fields else None
        colors = self._class_colors(classes, jittering)
        alpha = 0.5 if colors is None else 0.8
        if self._instance_mode == ColorMode.IMAGE_BW:
            alpha = 0.3
            grey = self.img.mean(axis=2, keepdims=True, dtype=np.float32).repeat(3, axis=2)
            if masks is not None:
                grey = np.where(masks.any(axis=0)[..., None], self.img, grey)
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
        for index, obj in enumerate(objects):
            labels[index] += "|crowd" if obj.get("iscrowd", 0) else ""
        return self.overlay_instances(
            boxes=[BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects],
            labels=labels,
            masks=[o["segmentation"] for o in objects] if "segmentation" in objects[0] else None,
            assigned_colors=self._class_colors(classes, jittering=True),
        )

    def _labels(self, classes: Sequence[int] | None, scores: Any) -> list[str] | None:
        names = self.metadata.get("thing_classes")
        labels = None
        if classes is not None:
            labels = [names[number] if names else str(number) for number in classes]
        if scores is not None:
            percents = [f"{float(score) * 100:.0f}%" for score in scores]
            pairs = zip(labels or [""] * len(percents), percents, strict=True)
            labels = [f"{label} {percent}".strip() for label, percent in pairs]
        return labels

    def _class_colors(self, classes: Sequence[int] | None, jittering: bool) -> list[Any] | None:
        table = self.metadata.get("thing_colors")
        if self._instance_mode != ColorMode.SEGMENTATION or not table or classes is None:
            return None
        colors = [np.array(table[number]) / 255 for number in classes]
        if jittering:  # a shift by 0.5 in a random direction
            shifts = [np.random.rand(3) for _ in colors]
            pairs = zip(colors, shifts, strict=True)
            colors = [np.clip(color + s / np.linalg.norm(s) * 0.5, 0, 1) for color, s in pairs]
        return colors

    def overlay_instances(
        self,
        *,
        boxes: Any = None,
        labels: Sequence[str] | None = None,
        masks: Any = None,
        assigned_colors: Sequence[Any] | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draw T objects, large ones first.

        ``boxes`` are Boxes or (T, 4) as (x0, y0, x1, y1); each of ``masks`` is a list of polygons,
        a run-length encoded mask or a binary mask (H, W), drawn with opacity ``alpha``. Default
        colours are random ones.
        """
        contours = None if masks is None else [self._contours(mask) for mask in masks]
        if boxes is None:
            extents = np.array([_bounding_box(polygons) for polygons in contours or ()])
        else:
            extents = boxes.tensor.detach().numpy() if isinstance(boxes, Boxes) else boxes
        extents = np.asarray(extents).reshape(-1, 4)
        for part in (labels, contours):
            assert part is None or len(part) == len(extents), "a part has another number of objects"
        colors = assigned_colors
        if colors is None:
            colors = [random_color(rgb=True, maximum=1) for _ in extents]
        for index in np.argsort(-np.prod(extents[:, 2:] - extents[:, :2], axis=1)).tolist():
            if boxes is not None:
                self.draw_box(extents[index], edge_color=colors[index])
            for polygon in contours[index] if contours is not None else ():
                self.draw_polygon(polygon, colors[index], alpha=alpha)
            if labels is not None:
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
        bitmap = np.ascontiguousarray(mask, dtype=np.uint8)
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
        size = growth * 0.5 * self._default_font_size
        bright = _lighten(color, 0.7)
        self.draw_text(text, position, font_size=size, color=bright, horizontal_alignment="left")

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
        line = {"edgecolor": edge_color, "linewidth": width, "linestyle": line_style}
        patch = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, alpha=alpha, **line)
        self.output.ax.add_patch(patch)
        return self.output

    def draw_polygon(
        self, segment: np.ndarray, color: Any, edge_color: Any = None, alpha: float = 0.5
    ) -> VisImage:
        """Fill a polygon (points, 2); the default edge is darker where the filling is opaque."""
        if edge_color is None:
            edge_color = _lighten(color, -0.7) if alpha > 0.8 else color
        width = max(self._default_font_size // 15 * self.output.scale, 1)
        face, edge = (*mplc.to_rgb(color), alpha), (*mplc.to_rgb(edge_color), 1)
        patch = Polygon(segment, fill=True, facecolor=face, edgecolor=edge, linewidth=width)
        self.output.ax.add_patch(patch)
        return self.output

    def get_output(self) -> VisImage:
        """The drawing so far."""
        return self.output


def _bounding_box(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """(x0, y0, x1, y1) around polygons (points, 2); zeros where there are none."""
    points = np.concatenate(polygons or [np.zeros((1, 2))])
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def _lighten(color: Any, amount: float) -> tuple[float, float, float]:
    """A colour whose lightness grew by the factor ``1 + amount``, amount in [-1, 1]."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*mplc.to_rgb(color))
    return colorsys.hls_to_rgb(hue, min(max(lightness * (1 + amount), 0.0), 1.0), saturation)
