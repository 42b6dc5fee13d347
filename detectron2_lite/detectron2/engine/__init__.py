"""The training loop, its hooks, and the usual beginning of a training script."""

from detectron2._absent import absent_name_getter

from . import hooks
from .defaults import create_ddp_model, default_argument_parser, default_setup, default_writers
from .hooks import *  # noqa: F403
from .launch import DEFAULT_TIMEOUT, launch
from .train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase

# fmt: off
__all__ = [
    "AMPTrainer", "DEFAULT_TIMEOUT", "HookBase", "SimpleTrainer", "TrainerBase", "create_ddp_model",
    "default_argument_parser", "default_setup", "default_writers", "hooks", "launch",
]
# fmt: on
__getattr__ = absent_name_getter(__name__)
