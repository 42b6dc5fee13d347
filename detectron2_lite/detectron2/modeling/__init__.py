"""Backbones, registries and the postprocessing of detections."""

from detectron2._absent import absent_name_getter
from detectron2.layers import ShapeSpec

from .backbone import BACKBONE_REGISTRY, Backbone, ResNet, ResNetBlockBase, make_stage
from .meta_arch import META_ARCH_REGISTRY
from .postprocessing import detector_postprocess

__all__ = [
    "BACKBONE_REGISTRY",
    "META_ARCH_REGISTRY",
    "Backbone",
    "ResNet",
    "ResNetBlockBase",
    "ShapeSpec",
    "detector_postprocess",
    "make_stage",
]
__getattr__ = absent_name_getter(__name__)
