"""Starting one process per GPU."""

import logging
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detectron2.utils import comm

__all__ = ["DEFAULT_TIMEOUT", "launch"]

DEFAULT_TIMEOUT = timedelta(minutes=30)


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple[Any, ...] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Calls ``main_func(*args)``, in as many processes as asked for; to be run on every machine.

    One process in all is this one, without a process group. Otherwise the processes are spawned and
    talk over NCCL, or over gloo on machines without GPU.

    Args:
        main_func: a function that pickle can find by its name.
        num_gpus_per_machine: number of processes per machine.
        num_machines: number of machines.
        machine_rank: number of this machine, from 0.
        dist_url: where the processes meet, such as "tcp://10.0.0.1:50152"; "auto" takes a free port
            on a single machine.
        args: arguments of ``main_func``.
        timeout: how long a collective operation may wait.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size <= 1:
        main_func(*args)
        return
    if dist_url == "auto":
        assert num_machines == 1, "dist_url 'auto' works on a single machine only."
        dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    if num_machines > 1 and (dist_url or "").startswith("file://"):
        logging.getLogger(__name__).warning("file:// is unreliable over machines: use tcp://.")
    worker_args = (
        main_func,
        world_size,
        num_gpus_per_machine,
        machine_rank,
        dist_url,
        args,
        timeout,
    )
    mp.start_processes(_run_worker, nprocs=num_gpus_per_machine, args=worker_args, daemon=False)


def _run_worker(
    local_rank: int,
    main_func: Callable[..., Any],
    world_size: int,
    num_gpus_per_machine: int,
    machine_rank: int,
    dist_url: str | None,
    args: tuple[Any, ...],
    timeout: timedelta,
) -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        found = torch.cuda.device_count()
        assert num_gpus_per_machine <= found, f"Asked for {num_gpus_per_machine} GPUs of {found}."
    try:
        dist.init_process_group(
            backend="nccl" if has_gpu else "gloo",
            init_method=dist_url,
            world_size=world_size,
            rank=machine_rank * num_gpus_per_machine + local_rank,
            timeout=timeout,
        )
    except Exception:
        logging.getLogger(__name__).error("The processes could not meet at %s.", dist_url)
        raise
    comm.create_local_process_group(num_gpus_per_machine)
    if has_gpu:
        torch.cuda.set_device(local_rank)
    comm.synchronize()  # nobody starts, and times out, while others still set up
    main_func(*args)
