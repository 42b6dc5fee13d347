"""Loggers on the terminal and in ``log.txt``."""

import atexit
import functools
import logging
import os
import sys
from collections import Counter
from typing import Any

from detectron2.utils.file_io import PathManager
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


_counts: Counter[Any] = Counter()


def _find_caller() -> tuple[str, Any]:
    """Module and line of the caller of a function of this file."""
    frame = sys._getframe(2)
    return frame.f_globals["__name__"], (frame.f_code, frame.f_lineno)


def log_first_n(
    lvl: int, msg: str, n: int = 1, *, name: str | None = None, key: Any = "caller"
) -> None:
    """Logs the first ``n`` times that the same "caller" or "message" (``key``, or both) comes."""
    module, line = _find_caller()
    identity = (line if "caller" in key else None, msg if "message" in key else None)
    _counts[identity] += 1
    if _counts[identity] <= n:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Logs the first of every ``n`` calls from the same line."""
    module, line = _find_caller()
    if _counts[line] % n == 0:
        logging.getLogger(name or module).log(lvl, msg)
    _counts[line] += 1
