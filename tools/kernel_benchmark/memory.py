"""How much memory work takes at its peak, beyond what is there before it starts."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from efficient_detr.errors import UserError

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Largest increase of memory while something runs.

    On a GPU that is what torch's allocator hands out. On a CPU it is the resident memory of the
    process, of which Linux keeps the largest value: this includes what operators use inside
    themselves. Other threads must not allocate meanwhile.

    Args:
        work: is called once.
        device: where it computes.

    Returns:
        Bytes; None on a CPU whose operating system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _return_freed_memory()
    try:
        _RESET.write_text("5")  # sets the largest value to the present one
        resident = _kilobytes("VmRSS")
    except (OSError, ValueError):
        return None
    work()
    return max(_kilobytes("VmHWM") - resident, 0) * 1024


def in_own_process(script: str, arguments: Sequence[str], what: str) -> Any:
    """Run a command that measures memory in a process that has freed nothing yet.

    Args:
        script: Python file of the command; its last printed line is JSON.
        arguments: its command line.
        what: is measured, for the sentence about a failure.

    Returns:
        What the JSON holds.

    Raises:
        UserError: if the process fails, or the system ends it for want of memory.
    """
    command = [sys.executable, script, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # In a session of its own: Ctrl-C is for this process, which then ends the other one.
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        start_new_session=True,
    )
    if done.returncode:
        raise UserError(
            f"The memory of {what} could not be measured: the process ended with status "
            f"{done.returncode}; is there enough memory?"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _return_freed_memory() -> None:
    """Give back what the allocator keeps: work that reused it would not be seen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(name: str) -> int:
    """A value of the process's status."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(f"{_STATUS} has no {name}.")
