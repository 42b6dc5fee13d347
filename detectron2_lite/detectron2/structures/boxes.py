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
    """What the numbers of a box mean. Only the first two modes can be converted here."""

    XYXY_ABS = 0  # corners (x0, y0, x1, y1) in pixels
    XYWH_ABS = 1  # top-left corner and size (x0, y0, w, h) in pixels
    XYXY_REL = 2  # corners divided by the image's width and height
    XYWH_REL = 3  # top-left corner and size, divided likewise
    XYWHA_ABS = 4  # centre, size and angle in degrees of a rotated box

    @staticmethod
    def convert(box: Any, from_mode: BoxMode, to_mode: BoxMode) -> Any:
        """Express 4 numbers (list or tuple) or N boxes (array or tensor (N, 4)) in another mode.

        The result is of the same Python type; lists and tuples of floats pass through float32.
        The input is never modified; it is returned itself where the modes are equal. Relative
        modes raise AssertionError, other unknown pairs of modes NotImplementedError.
        """
        if from_mode == to_mode:
            return box
        modes = (from_mode, to_mode)
        assert not {BoxMode.XYXY_REL, BoxMode.XYWH_REL} & {*modes}, "relative boxes do not convert"
        if isinstance(box, (list, tuple)):
            assert len(box) in (4, 5), f"a box has 4 (rotated: 5) numbers, got {box}"
            rows = torch.tensor(box)[None]
        else:
            rows = torch.from_numpy(box).clone() if isinstance(box, np.ndarray) else box.clone()
        if modes == (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
            rows[:, 2:4] += rows[:, :2]
        elif modes == (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
            rows[:, 2:4] -= rows[:, :2]
        else:
            raise NotImplementedError(f"{from_mode!r} to {to_mode!r} is not in detectron2_lite")
        if isinstance(box, (list, tuple)):
            return type(box)(rows.flatten().tolist())
        return rows.numpy() if isinstance(box, np.ndarray) else rows


class Boxes:
    """N boxes (x0, y0, x1, y1) in pixels, as one float32 tensor (N, 4) in ``tensor``."""

    def __init__(self, tensor: Tensor | np.ndarray | Sequence[Sequence[float]]) -> None:
        boxes = torch.as_tensor(tensor, dtype=torch.float32)
        if boxes.numel() == 0:
            boxes = boxes.reshape(-1, 4)
        assert boxes.dim() == 2 and boxes.shape[1] == 4, f"boxes are (N, 4), got {boxes.shape}"
        self.tensor = boxes

    def clone(self) -> Boxes:
        """A copy with its own memory."""
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device | str) -> Boxes:
        """The same boxes on ``device``."""
        return Boxes(self.tensor.to(device=device))

    @property
    def device(self) -> torch.device:
        """Where the tensor lies."""
        return self.tensor.device

    def area(self) -> Tensor:
        """Areas (N,) in square pixels."""
        width, height = (self.tensor[:, 2:] - self.tensor[:, :2]).unbind(1)
        return width * height

    def get_centers(self) -> Tensor:
        """Centres (N, 2) as (x, y)."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def clip(self, box_size: tuple[int, int]) -> None:
        """Move what lies outside an image of (height, width) onto its border.

        ``self.tensor`` is replaced, not written to; infinite and NaN raise AssertionError.
        """
        assert torch.isfinite(self.tensor).all(), "cannot clip boxes with infinite or NaN numbers"
        height, width = box_size
        x = self.tensor[:, 0::2].clamp(min=0, max=width)
        y = self.tensor[:, 1::2].clamp(min=0, max=height)
        self.tensor = torch.stack((x, y), dim=2).flatten(1)

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply x by ``scale_x`` and y by ``scale_y``, in place."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """Boolean (N,): which boxes are wider and higher than ``threshold`` pixels."""
        return (self.tensor[:, 2:] - self.tensor[:, :2] > threshold).all(dim=1)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> Tensor:
        """Boolean (N,): which boxes leave an image (height, width) by at most that many pixels."""
        limit = self.tensor.new_tensor(box_size[::-1]) + boundary_threshold
        from_top_left = (self.tensor[:, :2] >= -boundary_threshold).all(dim=1)
        return from_top_left & (self.tensor[:, 2:] < limit).all(dim=1)

    def __getitem__(self, item: Any) -> Boxes:
        """Boxes by number, slice, mask (N,) or indices; a single one stays (1, 4)."""
        rows = self.tensor[item]
        if isinstance(item, int):
            rows = rows[None]
        assert rows.dim() == 2, f"indexing boxes with {item} does not select whole boxes"
        return Boxes(rows)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"

    @classmethod
    def cat(cls, boxes_list: Sequence[Boxes]) -> Boxes:
        """All boxes of a list or tuple in one object that shares no memory with them."""
        assert isinstance(boxes_list, (list, tuple))
        assert all(isinstance(boxes, Boxes) for boxes in boxes_list)
        if not boxes_list:
            return cls(torch.empty(0))
        return cls(torch.cat([boxes.tensor for boxes in boxes_list]))


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
