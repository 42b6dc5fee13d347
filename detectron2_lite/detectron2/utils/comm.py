"""Talking between the processes of a distributed run; without one, every call is trivial."""

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_processes_per_machine: int | None = None


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Says how many processes, of consecutive ranks, each machine runs; ``launch`` calls it."""
    global _processes_per_machine
    _processes_per_machine = num_workers_per_machine


def get_local_size() -> int:
    if not _is_distributed():
        return 1
    advice = "There is no local process group: start the processes with detectron2's launch()."
    assert _processes_per_machine is not None, advice
    return _processes_per_machine


def get_local_rank() -> int:
    return get_rank() % get_local_size()


def synchronize() -> None:
    """Waits until all processes have come here."""
    if get_world_size() > 1:
        is_nccl = dist.get_backend() == dist.Backend.NCCL
        dist.barrier(device_ids=[torch.cuda.current_device()] if is_nccl else None)


@functools.cache
def _get_global_gloo_group() -> Any:
    # Objects travel through the CPU, so gathering them takes no GPU memory.
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD


def all_gather(data: Any) -> list[Any]:
    """Any picklable object from each process, by rank."""
    gathered = [data] * get_world_size()
    if len(gathered) > 1:
        dist.all_gather_object(gathered, data, group=_get_global_gloo_group())
    return gathered


def gather(data: Any, dst: int = 0) -> list[Any]:
    """As :func:`all_gather` on rank ``dst``; [] on the others."""
    gathered = [data] * get_world_size() if get_rank() == dst else []
    if get_world_size() > 1:
        dist.gather_object(data, gathered or None, dst=dst, group=_get_global_gloo_group())
    return gathered


def shared_random_seed() -> int:
    """A random number below 2**31, the same in all processes; all of them must call this."""
    return all_gather(np.random.randint(2**31))[0]


def reduce_dict(input_dict: dict[str, Any]) -> dict[str, Any]:
    """Means of scalar tensors over all processes; only rank 0 gets the right values."""
    if get_world_size() == 1:
        return input_dict
    names = sorted(input_dict)  # the same order everywhere
    with torch.no_grad():
        values = torch.stack([input_dict[name] for name in names])
        dist.reduce(values, dst=0)
        return dict(zip(names, values / get_world_size(), strict=True))
