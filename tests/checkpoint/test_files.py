"""Reading files of checkpoints; what is refused is in tests/engine/test_checkpointer.py."""

from __future__ import annotations

import os
import pathlib
import pickle
import resource
import warnings
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from efficient_detr.checkpoint.files import (
    DamagedCheckpointError,
    read_checkpoint,
    write_checkpoint,
)
from efficient_detr.errors import UserError


class Command:
    """Runs when a reader without care meets it."""

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self._marker,)


class Settings:
    """A class of a training script, which is not there when its file is read."""


def arguments() -> Namespace:
    """All kinds of values that authors keep beside their weights."""
    return Namespace(
        lr=np.float64(2e-4),
        epochs=np.int64(50),
        masks=np.bool_(False),
        output_dir=Path("logs/detr"),
        sizes=[480, 512],
        device=torch.device("cpu"),
        names={"a", "b"},
        means=np.arange(3, dtype=np.float32),
        nested=Namespace(dropout=0.1),
    )


@pytest.mark.parametrize("archive", [True, False])
def test_settings_of_a_training(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    weights = OrderedDict(weight=torch.ones(2), half=torch.ones(1, dtype=torch.float16))
    content = {"model": weights, "optimizer": {"state": {}}, "epoch": 49, "args": arguments()}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    read = read_checkpoint(path)
    assert list(read) == ["model", "optimizer", "epoch", "args"]
    assert torch.equal(read["model"]["weight"], torch.ones(2))
    assert read["model"]["half"].dtype == torch.float16
    settings = read["args"]
    assert (settings.lr, settings.epochs, settings.masks) == (2e-4, 50, False)
    assert settings.means.tolist() == [0, 1, 2]
    assert settings.nested == Namespace(dropout=0.1)
    assert settings.output_dir == pathlib.PurePath("logs/detr")


def test_paths_of_another_system(tmp_path: Path) -> None:
    """They can be read, although they cannot be made here."""
    path = tmp_path / "checkpoint.pth"
    content = {"model": {"w": torch.ones(1)}, "path": pathlib.PureWindowsPath("C:/logs")}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    # As it would be pickled on Windows; names end with a line there, so lengths do not matter.
    data = path.read_bytes()
    assert data.count(b"PureWindowsPath") == 1
    path.write_bytes(data.replace(b"PureWindowsPath", b"WindowsPath"))
    assert read_checkpoint(path)["path"] == pathlib.PureWindowsPath("C:/logs")


@pytest.mark.parametrize(
    ("wrap", "rest"),
    [
        (lambda w: w, set()),
        (lambda w: {"model": w, "ema_model": {"w": torch.zeros(1)}}, {"ema_model"}),
        (lambda w: {"model_ema": {"w": torch.zeros(1)}, "model": w}, {"model_ema"}),
        (lambda w: {"state_dict": w, "meta": {"epoch": 12}}, {"meta"}),
    ],
    ids=["bare", "ema_model", "model_ema", "state_dict"],
)
def test_entries(tmp_path: Path, wrap: Any, rest: set[str]) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(wrap({"w": torch.ones(1), "b": torch.zeros(2)}), path)
    read = read_checkpoint(path)
    assert set(read) == {"model", *rest}
    assert read["model"].keys() == {"w", "b"} and read["model"]["w"] == 1


def test_safetensors_by_the_name_of_a_download(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors?download=true"
    save_file({"w": torch.ones(1)}, path)
    assert read_checkpoint(path)["model"]["w"] == 1


@pytest.mark.parametrize("size", [1, 100, -100])
def test_a_part_of_an_archive_is_damaged_not_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"w": torch.ones(100)}}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedCheckpointError, match="end of the file is missing"):
        read_checkpoint(path)


@pytest.mark.parametrize("archive", [True, False])
def test_a_refusal_names_the_class_and_the_way_out(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    content = {"model": {"w": torch.ones(1)}, "cfg": Settings()}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(UserError) as error:
        read_checkpoint(path, "https://host/checkpoint.pth")
    text = str(error.value)
    assert text.startswith("The checkpoint https://host/checkpoint.pth holds code")
    for part in ("test_files.Settings", "refused", "throw-away container", "torch.save"):
        assert part in text
    assert "\n" not in text and not isinstance(error.value, DamagedCheckpointError)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("ending", [".pth", ".pkl"])
def test_code_is_named_and_not_run(tmp_path: Path, archive: bool, ending: str) -> None:
    path, marker = tmp_path / f"checkpoint{ending}", tmp_path / "ran"
    content = {"model": {"w": Command(str(marker))}}
    if ending == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=4 if archive else 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(UserError, match=rf"holds code \({os.name}\.mkdir\)"):
        read_checkpoint(path)
    assert not marker.exists()


def test_a_plain_pickle_under_the_name_of_torch_save(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(pickle.dumps({"model": {"w": np.ones(2)}}, protocol=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_checkpoint(path)["model"]["w"], torch.ones(2, dtype=torch.float64))
        path.write_bytes(pickle.dumps({"w": Command("ran")}, protocol=4))
        with pytest.raises(UserError, match=rf"holds code \({os.name}\.mkdir\)"):
            read_checkpoint(path)


@pytest.mark.parametrize("name", ["w", "b"])
def test_changed_bytes_of_an_archive_are_damage(tmp_path: Path, name: str) -> None:
    """In the pickle, where "w" stands, and in the values of "b"."""
    path = tmp_path / "checkpoint.pth"
    values = torch.arange(1000.0)
    torch.save({"model": {"a weight": torch.zeros(1), "b": values}}, path)
    data = path.read_bytes()
    place = data.index(b"a weight" if name == "w" else values.numpy().tobytes())
    path.write_bytes(data[:place] + bytes(8 * [0x9A]) + data[place + 8 :])
    with pytest.raises(DamagedCheckpointError, match="Bad CRC-32"):
        read_checkpoint(path)


def test_archives_without_checksums(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    stored = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {"w": torch.ones(1)}}, path)
    finally:
        torch.serialization.set_crc32_options(stored)
    assert read_checkpoint(path)["model"]["w"] == 1


def test_damage_of_an_old_file_is_not_called_code(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"w": torch.ones(9)}}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    # An opcode that no pickle has, where the entries begin.
    path.write_bytes(data.replace(b"X\x05\x00\x00\x00model", 10 * b"\xff", 1))
    assert path.read_bytes() != data
    with pytest.raises(DamagedCheckpointError, match="Unsupported operand 255"):
        read_checkpoint(path)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_writing_and_replacing(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"weights{ending}"
    shared = torch.arange(4.0)
    for offset in (0, 1):
        write_checkpoint(path, {"a": shared + offset, "b": shared[:2]}, {"class_names": ["cat"]})
    read = read_checkpoint(path)
    assert torch.equal(read["model"]["a"], shared + 1) and len(read["model"]["b"]) == 2
    assert read.get("class_names") == (["cat"] if ending == ".pth" else None)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_disk_without_room(tmp_path: Path, ending: str) -> None:
    """A limit for files raises the errors of a full disk."""
    path = tmp_path / f"weights{ending}"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError) as error:
            write_checkpoint(path, {"w": torch.zeros(1 << 16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value).startswith(f"{path} cannot be written (File too large): ")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_folder_that_nobody_may_write_to(ending: str) -> None:
    with pytest.raises(UserError, match=r"cannot be written \(.+\): "):
        write_checkpoint(f"/dev/null/weights{ending}", {"w": torch.zeros(1)}, {})
