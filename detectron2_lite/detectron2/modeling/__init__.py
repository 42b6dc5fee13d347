"""Backbones, the registry of whole models, and the postprocessing of detections."""

from detectron2.layers import ShapeSpec

from .backbone import (
    BACKBONE_REGISTRY,
    Backbone,
    ResNet,
    ResNetBlockBase,
    SwinTransformer,
    make_stage,
)
from .meta_arch import META_ARCH_REGISTRY
from .postprocessing import detector_postprocess
