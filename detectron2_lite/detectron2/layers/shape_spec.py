"""The contract between a backbone and what reads its features."""

from dataclasses import dataclass


@dataclass
class ShapeSpec:
    """What is known of a feature map: channels, size in cells, and stride in input pixels."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
