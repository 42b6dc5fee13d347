"""Processes: a single one, and two that talk over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

from detectron2.engine import launch
from detectron2.utils import comm


def test_a_single_process_talks_to_itself() -> None:
    assert (comm.get_rank(), comm.get_local_rank()) == (0, 0)
    assert (comm.get_world_size(), comm.get_local_size()) == (1, 1)
    assert comm.is_main_process()
    assert comm.all_gather({"a": 1}) == [{"a": 1}]
    assert comm.gather(3) == [3]
    values = {"loss": 2.0}
    assert comm.reduce_dict(values) is values
    assert 0 <= comm.shared_random_seed() < 2**31
    comm.synchronize()


def test_launching_one_process_is_a_call() -> None:
    calls: list[int] = []
    launch(calls.append, 1, args=(os.getpid(),))
    assert calls == [os.getpid()]


SCRIPT = """
import json, logging, sys
from pathlib import Path
import torch
from torch import nn
from detectron2.engine import create_ddp_model, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

def main(folder):
    rank = comm.get_rank()
    torch.set_num_threads(1)
    setup_logger(folder, rank, name="talk").info("hello")
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ddp = create_ddp_model(model, device_ids=None)
    ddp(torch.tensor([[float(rank)]])).sum().backward()
    reduced = comm.reduce_dict({"b": torch.tensor(rank + 1.0), "a": torch.tensor(4.0)})
    results = {
        "rank": [rank, comm.get_local_rank(), comm.get_world_size(), comm.get_local_size()],
        "main": comm.is_main_process(),
        "all_gather": comm.all_gather({"rank": rank}),
        "gather": comm.gather(rank),
        "gather_at_1": comm.gather(rank, dst=1),
        "reduced": {name: value.item() for name, value in reduced.items()},
        "seeds": comm.all_gather(comm.shared_random_seed()),
        "wrapped": type(ddp).__name__,
        "gradient": model.weight.grad.item(),
    }
    comm.synchronize()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))

if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=(sys.argv[1],))
"""


def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(tmp_path / "talk.py"), str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=240)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["rank"] == [0, 0, 2, 2]
    assert second["rank"] == [1, 1, 2, 2]
    assert (first["main"], second["main"]) == (True, False)
    assert first["all_gather"] == second["all_gather"] == [{"rank": 0}, {"rank": 1}]
    assert (first["gather"], second["gather"]) == ([0, 1], [])
    assert (first["gather_at_1"], second["gather_at_1"]) == ([], [0, 1])
    assert first["reduced"] == {"a": 4.0, "b": 1.5}, "the mean of 1 and 2, on rank 0"
    assert len(set(first["seeds"])) == 1
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["gradient"] == second["gradient"] == 0.5, "the mean of the inputs 0 and 1"
    assert "hello" in (tmp_path / "log.txt").read_text()
    assert "hello" in (tmp_path / "log.txt.rank1").read_text()
