"""Drawing boxes and labels on images with matplotlib."""

from collections.abc import Mapping, Sequence
from enum import Enum, unique
from typing import Any

import matplotlib.colors as mplc
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.colormap import random_color
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


@unique
class ColorMode(Enum):
    """What becomes of the image under predictions: it stays, or turns grey."""

    IMAGE = 0
    IMAGE_BW = 2


class VisImage:
    """A figure of an RGB image (H, W, 3) times ``scale``; ``ax`` draws in the image's pixels."""

    def __init__(self, img: np.ndarray, scale: float = 1.0) -> None:
        self.scale = scale
        self.height, self.width = img.shape[:2]
        self.fig = Figure(frameon=False)
        self.canvas = FigureCanvasAgg(self.fig)
        # matplotlib rounds sizes down: a hundredth of a pixel keeps the last row and column
        sides = [(side * scale + 1e-2) / self.fig.get_dpi() for side in (self.width, self.height)]
        self.fig.set_size_inches(*sides)
        self.ax = self.fig.add_axes((0.0, 0.0, 1.0, 1.0))
        self.ax.axis("off")
        self.reset_image(img)

    def reset_image(self, img: np.ndarray) -> None:
        extent = (0, self.width, self.height, 0)
        self.ax.imshow(img.astype(np.uint8), extent=extent, interpolation="nearest")

    def save(self, filepath: str) -> None:
        self.fig.savefig(filepath)

    def get_image(self) -> np.ndarray:
        """The drawing as uint8 RGB (H * scale, W * scale, 3)."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[:, :, :3].copy()


class Visualizer:
    """Draws annotations or predictions on an RGB image (H, W, 3) in 0 ... 255."""

    def __init__(
        self,
        img_rgb: np.ndarray,
        metadata: Any = None,
        scale: float = 1.0,
        instance_mode: ColorMode = ColorMode.IMAGE,
    ) -> None:
        self.img = np.asarray(img_rgb).clip(0, 255).astype(np.uint8)
        self.metadata = MetadataCatalog.get("__nonexist__") if metadata is None else metadata
        self.output = VisImage(self.img, scale=scale)
        side = np.sqrt(self.output.height * self.output.width)
        self._default_font_size = max(side // 90, 10 // scale)
        self._instance_mode = instance_mode

    def draw_instance_predictions(self, predictions: Instances) -> VisImage:
        """Draw ``pred_boxes``, with ``pred_classes`` and ``scores`` where present."""
        fields = predictions.get_fields()
        labels = [""] * len(predictions)
        if "pred_classes" in fields:
            labels = [self._class_name(number) for number in fields["pred_classes"].tolist()]
        if "scores" in fields:
            pairs = zip(labels, fields["scores"].tolist(), strict=True)
            labels = [f"{label} {score * 100:.0f}%".strip() for label, score in pairs]
        if self._instance_mode == ColorMode.IMAGE_BW:
            self.output.reset_image(self.img.mean(axis=2, keepdims=True).repeat(3, axis=2))
        return self.overlay_instances(boxes=fields["pred_boxes"], labels=labels)

    def draw_dataset_dict(self, dic: Mapping[str, Any]) -> VisImage:
        """Draw the boxes and classes of the ``annotations`` of an entry of a dataset."""
        objects = dic.get("annotations", [])
        labels = [self._class_name(obj["category_id"]) for obj in objects]
        for index, obj in enumerate(objects):
            labels[index] += "|crowd" if obj.get("iscrowd", 0) else ""
        boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
        return self.overlay_instances(boxes=boxes, labels=labels)

    def _class_name(self, number: int) -> str:
        names = self.metadata.get("thing_classes")
        return names[number] if names else str(number)

    def overlay_instances(
        self,
        *,
        boxes: Any,
        labels: Sequence[str] | None = None,
        assigned_colors: Sequence[Any] | None = None,
    ) -> VisImage:
        """Draw T boxes (T, 4) as (x0, y0, x1, y1), large ones first, in random colours."""
        extents = boxes.tensor.detach().numpy() if isinstance(boxes, Boxes) else np.asarray(boxes)
        extents = extents.reshape(-1, 4)
        labels = [""] * len(extents) if labels is None else labels
        colors = assigned_colors or [random_color(rgb=True, maximum=1) for _ in extents]
        assert len(labels) == len(colors) == len(extents), "labels or colours for other boxes"
        for index in np.argsort(-np.prod(extents[:, 2:] - extents[:, :2], axis=1)).tolist():
            x0, y0, _, _ = extents[index]
            color, left = colors[index], "left"
            self.draw_box(extents[index], edge_color=color)
            self.draw_text(labels[index], (x0, y0), color=color, horizontal_alignment=left)
        return self.output

    def draw_text(
        self,
        text: str,
        position: tuple[float, float],
        *,
        font_size: float | None = None,
        color: Any = "g",
        horizontal_alignment: str = "center",
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
        )
        return self.output

    def draw_box(self, box_coord: Any, alpha: float = 0.5, edge_color: Any = "g") -> VisImage:
        """Draw the outline of a box (x0, y0, x1, y1)."""
        x0, y0, x1, y1 = box_coord
        width = max(self._default_font_size / 4, 1) * self.output.scale
        line = {"edgecolor": edge_color, "linewidth": width, "alpha": alpha}
        self.output.ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **line))
        return self.output

    def get_output(self) -> VisImage:
        return self.output
