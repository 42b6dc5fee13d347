"""Axis-aligned boxes. Shape letters: N and M boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum, unique
from typing import Any

import numpy as np
import torch
from torch import Tensor


@unique
class BoxMode(IntEnum):
    """What the numbers of a box mean; only the first two modes convert into each other."""

    XYXY_ABS = 0  # corners (x0, y0, x1, y1) in pixels
    XYWH_ABS = 1  # top-left corner and size (x0, y0, w, h) in pixels
    XYXY_REL = 2  # corners divided by the image's width and height
    XYWH_REL = 3  # top-left corner and size, divided likewise
    XYWHA_ABS = 4  # centre, size and angle in degrees of a rotated box

    @staticmethod
    def convert(box: Any, from_mode: BoxMode, to_mode: BoxMode) -> Any:
        """4 numbers (list or tuple) or (N, 4) in another mode, of the same type.

        Lists and tuples pass through float32. Relative modes raise AssertionError.
        """
        if from_mode == to_mode:
            return box
        modes = {from_mode, to_mode}
        assert modes == {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}, f"{modes} are not in detectron2_lite"
        if isinstance(box, (list, tuple)):
            assert len(box) == 4, f"a box has 4 numbers, got {box}"
            row = BoxMode.convert(torch.tensor(box)[None], from_mode, to_mode)[0].tolist()
            return row if isinstance(box, list) else tuple(row)
        rows = box.clone() if isinstance(box, Tensor) else box.copy()
        rows[:, 2:] += rows[:, :2] if from_mode == BoxMode.XYWH_ABS else -rows[:, :2]
        return rows


class Boxes:
    """N boxes (x0, y0, x1, y1) in pixels, as one float32 tensor (N, 4) in ``tensor``."""

    def __init__(self, tensor: Tensor | np.ndarray | Sequence[Sequence[float]]) -> None:
        boxes = torch.as_tensor(tensor, dtype=torch.float32)
        if boxes.numel() == 0:
            boxes = boxes.reshape(-1, 4)
        assert boxes.dim() == 2 and boxes.shape[1] == 4, f"boxes are (N, 4), got {boxes.shape}"
        self.tensor = boxes

    def clone(self) -> Boxes:
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device | str) -> Boxes:
        return Boxes(self.tensor.to(device=device))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def area(self) -> Tensor:
        return (self.tensor[:, 2:] - self.tensor[:, :2]).prod(dim=1)

    def get_centers(self) -> Tensor:
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def clip(self, box_size: tuple[int, int]) -> None:
        """Limit the boxes to an image (height, width); infinite and NaN raise AssertionError."""
        assert torch.isfinite(self.tensor).all(), "cannot clip boxes with infinite or NaN numbers"
        height, width = box_size
        x = self.tensor[:, 0::2].clamp(min=0, max=width)
        y = self.tensor[:, 1::2].clamp(min=0, max=height)
        self.tensor = torch.stack((x, y), dim=2).flatten(1)

    def scale(self, scale_x: float, scale_y: float) -> None:
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """Boolean (N,): which boxes are wider and higher than ``threshold`` pixels."""
        return (self.tensor[:, 2:] - self.tensor[:, :2] > threshold).all(dim=1)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> Tensor:
        """Boolean (N,): which boxes leave an image (height, width) by at most so many pixels."""
        limit = self.tensor.new_tensor(box_size[::-1]) + boundary_threshold
        from_top_left = (self.tensor[:, :2] >= -boundary_threshold).all(dim=1)
        return from_top_left & (self.tensor[:, 2:] < limit).all(dim=1)

    def __getitem__(self, item: Any) -> Boxes:
        """Boxes by number, slice, mask (N,) or indices; a single one stays (1, 4)."""
        return Boxes(self.tensor[item][None] if isinstance(item, int) else self.tensor[item])

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"

    @classmethod
    def cat(cls, boxes_list: Sequence[Boxes]) -> Boxes:
        """All boxes in one object that shares no memory with them."""
        return cls(torch.cat([boxes.tensor for boxes in boxes_list] or [torch.empty(0)]))


def _pairwise_intersection(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    first, second = boxes1.tensor[:, None], boxes2.tensor  # (N, 1, 4), (M, 4)
    top_left = torch.max(first[..., :2], second[:, :2])
    bottom_right = torch.min(first[..., 2:], second[:, 2:])
    return (bottom_right - top_left).clamp(min=0).prod(dim=2)


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Intersection over union of all pairs, (N, M); 0 where two boxes do not overlap."""
    inter = _pairwise_intersection(boxes1, boxes2)
    union = boxes1.area()[:, None] + boxes2.area() - inter
    return torch.where(inter > 0, inter / union, inter.new_zeros(1))


def pairwise_ioa(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Intersection over the area of ``boxes2`` for all pairs, (N, M)."""
    inter = _pairwise_intersection(boxes1, boxes2)
    return torch.where(inter > 0, inter / boxes2.area(), inter.new_zeros(1))
