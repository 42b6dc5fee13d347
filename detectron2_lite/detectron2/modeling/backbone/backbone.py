"""The interface of backbones."""

from abc import ABCMeta, abstractmethod
from typing import Any

from detectron2.layers import ShapeSpec
from torch import Tensor, nn


class Backbone(nn.Module, metaclass=ABCMeta):
    """A network from images to feature maps by name.

    A subclass either overrides :meth:`output_shape` or sets the three attributes below.
    """

    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to {name: features (B, C, H / stride, W / stride)}."""

    @property
    def size_divisibility(self) -> int:
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        channels, strides = self._out_feature_channels, self._out_feature_strides
        return {f: ShapeSpec(channels=channels[f], stride=strides[f]) for f in self._out_features}
