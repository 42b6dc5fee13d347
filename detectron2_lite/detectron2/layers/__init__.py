"""Layers of convolutional backbones."""

from detectron2._absent import absent_name_getter

from .batch_norm import FrozenBatchNorm2d, get_norm
from .shape_spec import ShapeSpec
from .wrappers import CNNBlockBase, Conv2d

__getattr__ = absent_name_getter(__name__)
