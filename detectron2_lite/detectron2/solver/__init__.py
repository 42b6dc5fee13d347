"""Learning-rate schedules by iteration and parameter groups for optimizers."""

from detectron2._absent import absent_name_getter
from detectron2.solver.build import get_default_optimizer_params
from detectron2.solver.lr_scheduler import LRMultiplier, LRScheduler, WarmupParamScheduler

__all__ = ["LRMultiplier", "LRScheduler", "WarmupParamScheduler", "get_default_optimizer_params"]
__getattr__ = absent_name_getter(__name__)
