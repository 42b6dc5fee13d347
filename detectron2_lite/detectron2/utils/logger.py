"""Loggers on the terminal and in ``log.txt``, and messages that do not repeat themselves."""

import atexit
import functools
import logging
import os
import sys
import time
from collections import Counter
from typing import Any

from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from termcolor import colored

_DATE_FORMAT = "%m/%d %H:%M:%S"
_message_counts: Counter[Any] = Counter()
_message_times: dict[Any, float] = {}


class _ColorfulFormatter(logging.Formatter):
    """Shortens the name of the logger in a green header; marks warnings and errors in red."""

    def __init__(self, root_name: str, abbreviation: str) -> None:
        super().__init__(colored("[%(asctime)s %(name)s]: ", "green") + "%(message)s", _DATE_FORMAT)
        self._names = root_name + ".", abbreviation + "." if abbreviation else ""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.name = record.name.replace(*self._names)
        text = super().formatMessage(record)
        if record.levelno == logging.WARNING:
            return colored("WARNING", "red", attrs=["blink"]) + " " + text
        if record.levelno >= logging.ERROR:
            return colored("ERROR", "red", attrs=["blink", "underline"]) + " " + text
        return text


@functools.cache  # a second call with the same arguments adds no second handler
def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Prepares the logger ``name``, and so all below it, from level DEBUG on.

    Args:
        output: a ``.txt`` or ``.log`` file, or the directory of ``log.txt``; None writes no file.
        distributed_rank: only rank 0 writes to the terminal; others add ``.rankN`` to the file.
        color: whether the terminal gets colours.
        name: root of the loggers.
        abbrev_name: what the terminal shows instead of ``name``; "detectron2" becomes "d2".
        enable_propagation: whether messages also reach the loggers above.
        configure_stdout: whether to write to the terminal at all.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    if abbrev_name is None:
        abbrev_name = "d2" if name == "detectron2" else name
    header = "[%(asctime)s] %(name)s %(levelname)s: "
    plain = logging.Formatter(header + "%(message)s", datefmt=_DATE_FORMAT)
    if configure_stdout and distributed_rank == 0:
        terminal = logging.StreamHandler(sys.stdout)
        terminal.setFormatter(_ColorfulFormatter(name, abbrev_name) if color else plain)
        logger.addHandler(terminal)
    if output is not None:
        path = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
        path += f".rank{distributed_rank}" if distributed_rank > 0 else ""
        file_handler = logging.StreamHandler(_open_log_file(path))
        file_handler.setFormatter(plain)
        logger.addHandler(file_handler)
    return logger


@functools.cache  # loggers that share a file share its handle
def _open_log_file(path: str) -> Any:
    PathManager.mkdirs(os.path.dirname(path))
    file = PathManager.open(path, "a")
    atexit.register(file.close)
    return file


def _find_caller() -> tuple[str, tuple[str, int, str]]:
    """Module and position of the first frame outside this file."""
    frame: Any = sys._getframe(1)
    while frame.f_globals["__name__"] == __name__:
        frame = frame.f_back
    module = frame.f_globals["__name__"].replace("__main__", "detectron2")
    return module, (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def log_first_n(
    lvl: int, msg: str, n: int = 1, *, name: str | None = None, key: Any = "caller"
) -> None:
    """Logs the first ``n`` times that the same "caller" or "message" (``key``, or both) comes."""
    module, caller = _find_caller()
    identity = (caller if "caller" in key else None, msg if "message" in key else None)
    _message_counts[identity] += 1
    if _message_counts[identity] <= n:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Logs the first of every ``n`` calls from the same line."""
    module, caller = _find_caller()
    if _message_counts[caller] % n == 0:
        logging.getLogger(name or module).log(lvl, msg)
    _message_counts[caller] += 1


def log_every_n_seconds(lvl: int, msg: str, n: float = 1, *, name: str | None = None) -> None:
    """Logs at most once per ``n`` seconds from the same line."""
    module, caller = _find_caller()
    if time.time() - _message_times.get(caller, float("-inf")) >= n:
        logging.getLogger(name or module).log(lvl, msg)
        _message_times[caller] = time.time()


def create_small_table(small_dict: dict[str, Any]) -> str:
    """A table of one row under the keys of the dictionary."""
    style: Any = {"tablefmt": "pipe", "floatfmt": ".3f", "stralign": "center", "numalign": "center"}
    return tabulate([list(small_dict.values())], headers=list(small_dict), **style)
