"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lets a file be written under a temporary name, which it loses when it is complete.

    An error in the `with` block leaves an existing file as it was, and nothing half-written.

    Args:
        path: the file to make or replace; its folder must exist.

    Yields:
        Where to write: in the same folder, with the same ending.
    """
    path = Path(path)
    # With the process's number, because several may write the same file.
    partial_path = path.with_name(f".partial_{os.getpid()}_{path.name}")
    try:
        yield partial_path
        partial_path.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial_path.unlink(missing_ok=True)
