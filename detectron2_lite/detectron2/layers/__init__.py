"""Layers of convolutional backbones."""

from .batch_norm import FrozenBatchNorm2d, Norm, get_norm
from .blocks import CNNBlockBase
from .shape_spec import ShapeSpec
from .wrappers import BatchNorm2d, Conv2d, ConvTranspose2d, Linear, cat, interpolate
