"""Reading files of checkpoints; what is refused is in tests/engine/test_checkpointer.py."""

from __future__ import annotations

import pathlib
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from efficient_detr.checkpoint.files import DamagedCheckpointError, read_checkpoint
from efficient_detr.errors import UserError


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
