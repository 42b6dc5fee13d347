"""Matching of predictions to ground truth, and the losses.

A loss is an object called with `(DetectorOutput, list[Targets])`; it returns named, weighted terms.
"""

from efficient_detr.losses.distillation import BoxDistillationLoss
from efficient_detr.losses.foreground import (
    BoxSizeForeground,
    ForegroundLoss,
    SideDistanceForeground,
)
from efficient_detr.losses.interface import DetectorLoss
from efficient_detr.losses.matcher import FocalClassCost, HungarianMatcher, SoftmaxClassCost
from efficient_detr.losses.set_loss import FocalClassLoss, SetLoss, SoftmaxClassLoss
from efficient_detr.losses.token_attention import TokenAttentionLoss

__all__ = [
    "BoxDistillationLoss",
    "BoxSizeForeground",
    "DetectorLoss",
    "FocalClassCost",
    "FocalClassLoss",
    "ForegroundLoss",
    "HungarianMatcher",
    "SetLoss",
    "SideDistanceForeground",
    "SoftmaxClassCost",
    "SoftmaxClassLoss",
    "TokenAttentionLoss",
]
