"""Names to objects, files, pickling, seeds and messages."""

import logging
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.transforms import RandomFlip
from detectron2.layers import ShapeSpec
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from detectron2.utils.registry import _convert_target_to_string, locate
from detectron2.utils.serialize import PicklableWrapper


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.optim.SGD, "torch.optim.SGD"),
        (RandomFlip, "detectron2.data.transforms.RandomFlip"),
        (ShapeSpec, "detectron2.layers.ShapeSpec"),
        (len, "builtins.len"),
        (Path.home, "pathlib.Path.home"),
    ],
)
def test_names_are_short_and_lead_back(target: object, name: str) -> None:
    assert _convert_target_to_string(target) == name
    assert locate(name) == target


def test_long_names_lead_there_too() -> None:
    assert locate("torch.optim.sgd.SGD") is torch.optim.SGD
    assert locate("detectron2.layers.shape_spec.ShapeSpec") is ShapeSpec
    with pytest.raises(ImportError):
        locate("no_such_module.Thing")


def test_paths_on_disk_are_plain(tmp_path: Path) -> None:
    with PathManager.open(str(tmp_path / "a.txt"), "w") as file:
        file.write("text")
    assert PathManager.get_local_path(str(tmp_path / "a.txt")) == str(tmp_path / "a.txt")
    assert PathManager.exists(str(tmp_path / "a.txt"))


def test_closures_can_be_pickled() -> None:
    offset = 3
    wrapped = PicklableWrapper(PicklableWrapper(lambda x: x + offset))
    assert wrapped(1) == 4
    restored = pickle.loads(pickle.dumps(wrapped))
    assert restored(2) == 5


def test_a_seed_repeats_all_random_numbers() -> None:
    draws = []
    for seed in (3, 3, None):
        seed_all_rng(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1] != draws[2]


def _write(folder: Path, rank: int, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What the terminal and the file show of one message."""
    name = f"detectron2_test_{rank}"
    setup_logger(str(folder), rank, color=False, name=name)
    setup_logger(str(folder), rank, color=False, name=name)  # adds nothing
    logging.getLogger(f"{name}.part").warning("a message")
    suffix = f".rank{rank}" if rank else ""
    return capsys.readouterr().out, (folder / f"log.txt{suffix}").read_text()


def test_loggers_write_to_terminal_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = r"\[\d\d/\d\d \d\d:\d\d:\d\d\] detectron2_test_0\.part WARNING: a message\n"
    terminal, file = _write(tmp_path, 0, capsys)
    assert re.fullmatch(pattern, terminal)
    assert re.fullmatch(pattern, file)
    terminal, file = _write(tmp_path, 1, capsys)
    assert terminal == ""
    assert file.endswith("part WARNING: a message\n")
