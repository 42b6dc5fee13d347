"""Layers of convolutional backbones."""

from detectron2._absent import absent_name_getter

from .batch_norm import FrozenBatchNorm2d, get_norm
from .blocks import CNNBlockBase
from .shape_spec import ShapeSpec
from .wrappers import BatchNorm2d, Conv2d, ConvTranspose2d, Linear, cat, interpolate

__all__ = [
    "BatchNorm2d",
    "CNNBlockBase",
    "Conv2d",
    "ConvTranspose2d",
    "FrozenBatchNorm2d",
    "Linear",
    "ShapeSpec",
    "cat",
    "get_norm",
    "interpolate",
]
__getattr__ = absent_name_getter(__name__)
