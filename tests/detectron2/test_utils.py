"""Names to objects, files, pickling, seeds and messages."""

import logging
import pickle
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.transforms import RandomFlip
from detectron2.layers import ShapeSpec
from detectron2.utils import logger as logger_module
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import TORCH_VERSION, seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import (
    create_small_table,
    log_every_n,
    log_every_n_seconds,
    log_first_n,
    setup_logger,
)
from detectron2.utils.registry import Registry, _convert_target_to_string, locate
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


def test_registries() -> None:
    registry = Registry("PARTS")
    registry.register(ShapeSpec)
    assert registry.get("ShapeSpec") is ShapeSpec
    with pytest.raises(KeyError):
        registry.get("Missing")


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
    assert PicklableWrapper([1, 2]).count(2) == 1


def test_a_seed_repeats_all_random_numbers() -> None:
    draws = []
    for seed in (3, 3, None):
        seed_all_rng(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1] != draws[2]


def test_versions_are_reported() -> None:
    assert tuple(map(int, torch.__version__.split(".")[:2])) == TORCH_VERSION
    report = collect_env_info()
    for name in ("Python", "detectron2", "PyTorch", torch.__version__, np.__version__):
        assert name in report


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


def test_coloured_names_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger(name="long_name", abbrev_name="ln")
    logging.getLogger("long_name.part").info("a message")
    logging.getLogger("long_name.part").error("another")
    first, second = capsys.readouterr().out.splitlines()
    assert "ln.part" in first
    assert "long_name" not in first
    assert "ERROR" in second


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO):
        yield caplog


def test_repeated_messages(messages: pytest.LogCaptureFixture) -> None:
    for number in range(7):
        log_first_n(logging.INFO, f"first {number}", n=2)
        log_every_n(logging.INFO, f"every {number}", n=3)
        log_every_n_seconds(logging.INFO, f"seconds {number}", n=1000)
    for number in (1, 1, 2):
        log_first_n(logging.INFO, f"text {number}", key="message")
    assert [record.message for record in messages.records] == [
        "first 0",
        "every 0",
        "seconds 0",
        "first 1",
        "every 3",
        "every 6",
        "text 1",
        "text 2",
    ]
    assert {record.name for record in messages.records} == {__name__}


def test_messages_can_wait(
    messages: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(logger_module.time, "time", lambda: clock[0])
    for clock[0] in (100.0, 105.0, 110.0):
        log_every_n_seconds(logging.INFO, f"at {clock[0]}", n=10)
    assert [record.message for record in messages.records] == ["at 100.0", "at 110.0"]


def test_small_tables() -> None:
    assert create_small_table({"AP": 1.23456, "AP50": 2}).splitlines() == [
        "|  AP   |  AP50  |",
        "|:-----:|:------:|",
        "| 1.235 |   2    |",
    ]
