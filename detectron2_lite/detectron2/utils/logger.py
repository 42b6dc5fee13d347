"""Loggers on the terminal and in ``log.txt``."""

import atexit
import functools
import logging
import os
import sys
import time
from typing import Any

from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from termcolor import colored


@functools.cache  # a second call with the same arguments adds no second handler
def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
    enable_propagation: bool = False,
) -> logging.Logger:
    """Prepares the logger ``name``, and so all below it, from level DEBUG on.

    Rank 0 writes to the terminal; all write to ``log.txt``, others than 0 to ``log.txt.rankN``, in
    the directory ``output``, if any.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    header = "[%(asctime)s] %(name)s %(levelname)s: "
    targets: list[tuple[Any, str]] = []
    if distributed_rank == 0:
        targets.append((sys.stdout, colored(header, "green") if color else header))
    if output is not None:
        suffix = f".rank{distributed_rank}" if distributed_rank > 0 else ""
        targets.append((_open_log_file(os.path.join(output, "log.txt" + suffix)), header))
    for stream, start in targets:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(start + "%(message)s", "%m/%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


@functools.cache  # loggers that share a file share its handle
def _open_log_file(path: str) -> Any:
    PathManager.mkdirs(os.path.dirname(path))
    file = PathManager.open(path, "a")
    atexit.register(file.close)
    return file


_last_logged: dict[Any, float] = {}


def log_every_n_seconds(lvl: int, msg: str, n: float = 1) -> None:
    """Logs at most once per ``n`` seconds from the same line."""
    frame = sys._getframe(1)
    line = (frame.f_code, frame.f_lineno)
    if time.time() - _last_logged.get(line, float("-inf")) >= n:
        logging.getLogger(frame.f_globals["__name__"]).log(lvl, msg)
        _last_logged[line] = time.time()


def create_small_table(small_dict: dict[str, Any]) -> str:
    """A table of one row under the keys of the dictionary."""
    rows = [list(small_dict.values())]
    return tabulate(rows, headers=list(small_dict), tablefmt="pipe", floatfmt=".3f")
