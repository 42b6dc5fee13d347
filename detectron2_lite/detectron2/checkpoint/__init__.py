"""Saving and loading models and the state of a training."""

from detectron2._absent import absent_name_getter
from detectron2.checkpoint.detection_checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer

__all__ = ["Checkpointer", "PeriodicCheckpointer", "DetectionCheckpointer"]
__getattr__ = absent_name_getter(__name__)
