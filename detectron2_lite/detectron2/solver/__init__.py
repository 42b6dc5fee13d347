"""Parameter groups for optimizers, and schedules of their learning rates."""

from .build import get_default_optimizer_params
from .lr_scheduler import LRMultiplier, LRScheduler, WarmupParamScheduler
