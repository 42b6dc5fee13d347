"""Starting one process per GPU."""

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

DEFAULT_TIMEOUT = timedelta(minutes=30)


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple[Any, ...] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Calls ``main_func(*args)`` in as many processes as asked for; to be run on every machine.

    A single process is this one, without a process group. Otherwise the processes are spawned (so
    pickle has to find the function by name), meet at ``dist_url`` ("auto" takes a free port of this
    machine), and talk over NCCL, or over gloo where there is no GPU.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size <= 1:
        main_func(*args)
        return
    if dist_url == "auto":
        assert num_machines == 1, "dist_url 'auto' works on a single machine only."
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            dist_url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    first_rank = machine_rank * num_gpus_per_machine
    group = {"init_method": dist_url, "world_size": world_size, "timeout": timeout}
    worker_args = (main_func, args, num_gpus_per_machine, first_rank, group)
    mp.start_processes(_run_worker, nprocs=num_gpus_per_machine, args=worker_args, daemon=False)


def _run_worker(
    local_rank: int,
    main_func: Callable[..., Any],
    args: tuple[Any, ...],
    num_processes: int,
    first_rank: int,
    group: dict[str, Any],
) -> None:
    if has_gpu := torch.cuda.is_available():
        found = torch.cuda.device_count()
        assert num_processes <= found, f"{num_processes} GPUs were asked for, {found} are here."
        torch.cuda.set_device(local_rank)
    backend = "nccl" if has_gpu else "gloo"
    dist.init_process_group(backend=backend, rank=first_rank + local_rank, **group)
    comm.create_local_process_group(num_processes)
    comm.synchronize()  # nobody starts, and times out, while others still set up
    main_func(*args)
