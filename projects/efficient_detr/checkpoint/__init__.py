"""Published checkpoint layouts -> ours."""

from efficient_detr.checkpoint.conversion import KeyRule, convert_keys
from efficient_detr.checkpoint.formats import detrex

__all__ = ["KeyRule", "convert_keys", "detrex"]
