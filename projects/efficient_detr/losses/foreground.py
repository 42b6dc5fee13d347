"""Supervision of Focus-DETR's token scores (section 3.2): which tokens lie on an object.

A token of a level is foreground if it lies in a box of a size that suits the level. The paper and
the released code differ in what "size" and "suits" mean; both rules are here, as two classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from efficient_detr.boxes import cxcywh_to_xyxy
from efficient_detr.errors import ConfigError
from efficient_detr.losses.interface import DetectorLoss
from efficient_detr.modeling.detector import Detector
from efficient_detr.structures import DetectorOutput, SpatialShapes, Targets

NO_SELECTION = (
    "ForegroundLoss supervises a token selection, but model.detector.selection is not set: remove "
    "the loss from model.losses or add a selection"
)


class SideDistanceForeground(nn.Module):
    """The released code's rule: by the largest distance from a token to a side of the box.

    A token of level l is foreground if it lies strictly inside a box and its largest distance to
    the four sides is in (ends[l - 1], ends[l]] pixels. Levels share no distance, so tokens of one
    box can belong to different levels.

    Args:
        strides: pixels a cell, for each level.
        ends: largest distance of each level but the last, whose range is open.
    """

    def __init__(
        self,
        *,
        strides: Sequence[int] = (8, 16, 32, 64),
        ends: Sequence[float] = (64, 128, 256),
    ) -> None:
        super().__init__()
        _check_levels(strides, ends)
        self.strides = tuple(strides)
        self.ranges = list(zip([-1.0, *ends], [*ends, torch.inf], strict=True))

    def forward(self, spatial_shapes: SpatialShapes, target: Targets) -> list[Tensor]:
        """Foreground of each level, bool (H_l W_l,)."""
        _check_shapes(spatial_shapes, self.strides)
        labels = []
        for shape, stride, (low, high) in zip(
            spatial_shapes, self.strides, self.ranges, strict=True
        ):
            sides = side_distances(shape, stride, target)
            farthest = sides.amax(-1)
            inside = sides.amin(-1) > 0
            labels.append((inside & (farthest > low) & (farthest <= high)).any(-1))
        return labels


class BoxSizeForeground(nn.Module):
    """The paper's rule: by half the longer side of the box, with overlapping ranges.

    A token of level l is foreground if it lies strictly inside a box whose half longer side is in
    [begins[l], ends[l]] pixels. The range of a level begins in the middle of the range before it,
    so that neighbouring levels share the objects of sizes between.

    Args:
        strides: pixels a cell, for each level.
        ends: largest half side of each level but the last, whose range is open.
    """

    def __init__(
        self,
        *,
        strides: Sequence[int] = (8, 16, 32, 64),
        ends: Sequence[float] = (64, 128, 256),
    ) -> None:
        super().__init__()
        _check_levels(strides, ends)
        self.strides = tuple(strides)
        begins = [0.0]
        for end in ends:
            begins.append((begins[-1] + end) / 2)
        self.ranges = list(zip(begins, [*ends, torch.inf], strict=True))

    def forward(self, spatial_shapes: SpatialShapes, target: Targets) -> list[Tensor]:
        """Foreground of each level, bool (H_l W_l,)."""
        _check_shapes(spatial_shapes, self.strides)
        height, width = target.image_size
        scale = target.boxes.new_tensor([width, height])
        half_side = (target.boxes[:, 2:] * scale).amax(-1) / 2  # (T,)
        labels = []
        for shape, stride, (low, high) in zip(
            spatial_shapes, self.strides, self.ranges, strict=True
        ):
            inside = side_distances(shape, stride, target).amin(-1) > 0  # (S_l, T)
            labels.append((inside & (half_side >= low) & (half_side <= high)).any(-1))
        return labels


def side_distances(shape: tuple[int, int], stride: int, target: Targets) -> Tensor:
    """(S_l, T, 4) pixels from each token to the left, top, right and bottom side of each box.

    Negative outside the box. A token sits at (column * stride + stride // 2, ...) in the image.
    """
    height, width = target.image_size
    device = target.boxes.device
    rows = torch.arange(shape[0], device=device) * stride + stride // 2
    columns = torch.arange(shape[1], device=device) * stride + stride // 2
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.stack([x, y], dim=-1).flatten(0, 1)[:, None].float()  # (S_l, 1, 2)
    scale = target.boxes.new_tensor([width, height, width, height])
    boxes = cxcywh_to_xyxy(target.boxes * scale)[None]
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def _check_levels(strides: Sequence[int], ends: Sequence[float]) -> None:
    if len(ends) != len(strides) - 1:
        raise ConfigError(
            f"foreground labels for {len(strides)} strides need {len(strides) - 1} range ends, "
            f"not {len(ends)}"
        )


def _check_shapes(spatial_shapes: SpatialShapes, strides: Sequence[int]) -> None:
    if len(spatial_shapes) != len(strides):
        raise ConfigError(
            f"the detector has {len(spatial_shapes)} levels, but the foreground labels are set up "
            f"for {len(strides)} strides {tuple(strides)}: set the strides of the foreground loss"
        )


class ForegroundLoss(DetectorLoss):
    """`loss_foreground`: focal loss of the token scores, padding counting as background.

    Args:
        labels: rule that says which tokens are foreground.
        weight: factor of the loss.
        alpha: weight of positives, in (0, 1).
        gamma: focusing exponent.
    """

    supervises_selection = True

    def __init__(
        self,
        *,
        labels: SideDistanceForeground | BoxSizeForeground,
        weight: float = 1.5,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.labels = labels
        self.weight = weight
        self.alpha = alpha
        self.gamma = gamma

    def check_detector(self, detector: Detector) -> None:
        """Refuse a detector without selection, or with another number of levels."""
        if detector.selection is None:
            raise ConfigError(NO_SELECTION)
        if len(self.labels.strides) != detector.neck.num_levels:
            raise ConfigError(
                f"{type(self.labels).__name__} of ForegroundLoss has strides for "
                f"{len(self.labels.strides)} levels, but detector.neck "
                f"({type(detector.neck).__name__}) gives {detector.neck.num_levels}: give a stride "
                "for each level"
            )

    def forward(self, output: DetectorOutput, targets: list[Targets]) -> dict[str, Tensor]:
        """Mean over images of the summed loss divided by the image's foreground tokens.

        Raises:
            ConfigError: if the detector selects no tokens.
        """
        if output.selection is None:
            raise ConfigError(NO_SELECTION)
        logits = torch.cat(output.selection.level_logits, dim=1).float()  # (B, S)
        losses = []
        for image_logits, target in zip(logits, targets, strict=True):
            labels = torch.cat(self.labels(output.memory.spatial_shapes, target)).float()
            loss = sigmoid_focal_loss(image_logits, labels, self.alpha, self.gamma, "sum")
            losses.append(loss / labels.sum().clamp(min=1))
        return {"loss_foreground": self.weight * torch.stack(losses).mean()}
