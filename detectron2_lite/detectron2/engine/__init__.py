"""The training loop, its hooks, and the usual beginning of a training script."""

from . import hooks
from .defaults import create_ddp_model, default_argument_parser, default_setup, default_writers
from .launch import DEFAULT_TIMEOUT, launch
from .train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase
