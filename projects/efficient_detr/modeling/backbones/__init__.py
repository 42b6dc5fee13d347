"""Backbones that Detectron2 does not have, and stages for those that it has."""

from efficient_detr.modeling.backbones.dat import DAT, DATBlock, DATStage
from efficient_detr.modeling.backbones.dat_variants import (
    VARIANTS,
    StageSpecification,
    add_dat_config,
    build_dat_backbone,
    dat_backbone,
)
from efficient_detr.modeling.backbones.dilated_resnet import dilated_resnet_stages

__all__ = [
    "DAT",
    "VARIANTS",
    "DATBlock",
    "DATStage",
    "StageSpecification",
    "add_dat_config",
    "build_dat_backbone",
    "dat_backbone",
    "dilated_resnet_stages",
]
