"""What the command lines of benchmarks share: checks of their arguments, and the thread count."""

from __future__ import annotations

import argparse
import errno
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from efficient_detr.errors import UserError

INTERRUPTED_STATUS = 130  # 128 and the number of the signal, as shells have it


def check_device(name: str) -> None:
    """Refuse a GPU where there is none.

    Raises:
        UserError: if torch cannot use the device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use, and there is none here.")


def check_counts(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse numbers below 1; None stands for a default.

    Args:
        arguments: the command line.
        names: attributes of it, which bear the names of their options.

    Raises:
        UserError: naming the option and its value.
    """
    for name in names:
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {number}.")


def check_config_names(files: Sequence[str]) -> None:
    """Refuse configs that results could not tell apart, because these go by the files' stems.

    Raises:
        UserError: naming the files.
    """
    times = Counter(Path(file).stem for file in files)
    same = [file for file in files if times[Path(file).stem] > 1]
    if same:
        raise UserError(
            f"--config-file: {', '.join(same)} must differ in name, folders aside, because results "
            "go by it: give them in separate runs."
        )


def check_writable(path: Path, option: str) -> None:
    """Check that a result file can be written, without making its folder yet.

    Args:
        path: the file.
        option: the option that names it, with its dashes.

    Raises:
        UserError: naming both and the reason.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be written ({error.strerror or error}): give a file in a "
            "folder that you may write to."
        ) from error


def report_interruption() -> int:
    """Say that the user has stopped the command; returns the exit status that tells of it."""
    sys.stderr.write("Interrupted\n")
    return INTERRUPTED_STATUS


@contextmanager
def chosen_threads(threads: int | None) -> Iterator[None]:
    """Compute with a number of threads for a while; None for torch's choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
