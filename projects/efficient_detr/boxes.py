"""Box arithmetic on (..., 4) tensors, always in float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (x0, y0, x1, y1), shape (..., 4)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(x0, y0, x1, y1) -> (cx, cy, w, h), shape (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area of (x0, y0, x1, y1) boxes (..., 4); shape (...)."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised intersection over union (Rezatofighi et al. 2019) of broadcast boxes.

    Args:
        first: (..., 4) boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1.
        second: (..., 4) likewise; shapes broadcast, so `a[:, None]` and `b[None]` give all pairs.

    Returns:
        (...) values in (-1, 1].
    """
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    union = box_area(first) + box_area(second) - intersection
    hull_low = torch.minimum(first[..., :2], second[..., :2])
    hull_high = torch.maximum(first[..., 2:], second[..., 2:])
    hull = (hull_high - hull_low).prod(dim=-1)
    # Two empty boxes have union 0 (and at one point hull 0): call that no overlap, not NaN.
    iou = intersection / union.masked_fill(union == 0, 1)
    return iou - (hull - union) / hull.masked_fill(hull == 0, 1)


def inverse_sigmoid(values: Tensor, eps: float = 1e-3) -> Tensor:
    """Logit of values in [0, 1], kept finite by bounding the value and its complement by `eps`.

    The published DINO weights were trained with eps = 1e-3 (Deformable DETR uses 1e-5).
    """
    values = values.clamp(0, 1)
    return torch.log(values.clamp(min=eps) / (1 - values).clamp(min=eps))
