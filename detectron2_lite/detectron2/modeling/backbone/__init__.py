"""Backbones: ResNet, and the interface of all others."""

from detectron2._absent import absent_name_getter
from fvcore.common.registry import Registry

from .backbone import Backbone
from .resnet import BasicStem, BottleneckBlock, ResNet

BACKBONE_REGISTRY = Registry("BACKBONE")
__getattr__ = absent_name_getter(__name__)
