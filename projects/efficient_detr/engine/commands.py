"""What the commands share: command lines about pictures, logging, and the end after an error."""

from __future__ import annotations

import argparse
import sys

from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from efficient_detr.engine.checks import (
    check_arguments,
    check_device,
    check_init_checkpoint,
    check_parts,
    load_config,
)
from efficient_detr.engine.train import set_up_logging
from efficient_detr.errors import UserError

NO_PICTURE_STATUS = 1
USER_ERROR_STATUS = 2

PARTS_OF_PICTURES = ("model", "train")
TRAIN_OPTIONS_OF_PICTURES = ("device", "init_checkpoint")
"""What commands about pictures read of a config, with `PARTS_OF_PICTURES`."""


def report_user_error(error: UserError) -> int:
    """Write the sentence to stderr; returns the exit status that tells of it."""
    sys.stderr.write(f"Error: {error}\n")
    return USER_ERROR_STATUS


def start_logging() -> None:
    """Log to the terminal, as training does."""
    setup_logger(name="fvcore")
    setup_logger()
    set_up_logging()


def picture_parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with a config, its overrides and pictures.

    ``--opts`` must come last on the command line, because it takes all that follows.

    Args:
        description: the text of ``--help``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="LazyConfig")
    parser.add_argument(
        "--input", nargs="+", required=True, help="pictures, folders of pictures or glob patterns"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="overrides, path.to.key=value"
    )
    return parser


def picture_config(args: argparse.Namespace) -> DictConfig:
    """The config that a command line about pictures asks for.

    Args:
        args: of `picture_parser`, with an option ``--weights``.

    Raises:
        UserError: if the config lacks a part, gives one an unknown argument, or names a device or
            weights that are not there.
    """
    weights = [] if args.weights is None else [f"train.init_checkpoint='{args.weights}'"]
    config = load_config(args.config_file, [*args.opts, *weights])
    check_parts(config, PARTS_OF_PICTURES, TRAIN_OPTIONS_OF_PICTURES)
    check_arguments(config)
    check_device(config, 1)
    check_init_checkpoint(config)
    return config
