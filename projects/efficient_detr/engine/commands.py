"""What the commands share: command lines about pictures, logging, and the end after an error."""

from __future__ import annotations

import argparse
import sys

from detectron2.utils.logger import setup_logger

from efficient_detr.engine.train import set_up_logging
from efficient_detr.errors import UserError

NO_PICTURE_STATUS = 1
USER_ERROR_STATUS = 2


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
