"""Saving and loading models and the state of a training."""

from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer

from detectron2._absent import absent_name_getter
from detectron2.checkpoint.detection_checkpoint import DetectionCheckpointer

__all__ = ["Checkpointer", "PeriodicCheckpointer", "DetectionCheckpointer"]
__getattr__ = absent_name_getter(__name__)
