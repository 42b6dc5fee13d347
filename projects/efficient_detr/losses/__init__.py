"""Matching of predictions to ground truth, and the losses.

A loss is an object called with `(DetectorOutput, list[Targets])`; it returns named, weighted terms.
"""

from efficient_detr.losses.foreground import (
    BoxSizeForeground,
    ForegroundLoss,
    SideDistanceForeground,
)
from efficient_detr.losses.matcher import FocalClassCost, HungarianMatcher
from efficient_detr.losses.set_loss import FocalClassLoss, SetLoss

__all__ = [
    "BoxSizeForeground",
    "FocalClassCost",
    "FocalClassLoss",
    "ForegroundLoss",
    "HungarianMatcher",
    "SetLoss",
    "SideDistanceForeground",
]
