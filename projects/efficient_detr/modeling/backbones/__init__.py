"""Backbones that Detectron2 does not have, and stages for those that it has."""

from efficient_detr.modeling.backbones.dilated_resnet import dilated_resnet_stages

__all__ = ["dilated_resnet_stages"]
