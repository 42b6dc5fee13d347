"""Backbones, the registry of whole models, and the postprocessing of detections."""

from detectron2._absent import absent_name_getter
from fvcore.common.registry import Registry

from .backbone import BACKBONE_REGISTRY, Backbone, ResNet
from .postprocessing import detector_postprocess

META_ARCH_REGISTRY = Registry("META_ARCH")
__getattr__ = absent_name_getter(__name__)
