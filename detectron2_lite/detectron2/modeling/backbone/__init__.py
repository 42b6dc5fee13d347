"""Backbones: ResNet, and the interface of all others."""

from detectron2._absent import absent_name_getter

from .backbone import Backbone
from .build import BACKBONE_REGISTRY
from .resnet import BasicStem, BottleneckBlock, ResNet, ResNetBlockBase, make_stage

__all__ = [
    "BACKBONE_REGISTRY",
    "Backbone",
    "BasicStem",
    "BottleneckBlock",
    "ResNet",
    "ResNetBlockBase",
    "make_stage",
]
__getattr__ = absent_name_getter(__name__)
