"""Checkpoints of other people and other configs: read without running code, or refused."""

import logging
import os
import pickle
import re
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from efficient_detr.engine.checkpointer import AtomicCheckpointer
from efficient_detr.engine.checks import load_config
from efficient_detr.engine.train import run
from efficient_detr.errors import UserError
from tests.engine.tiny import write_project


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def arrays() -> dict[str, Any]:
    return {"weight": np.full((2, 3), 2, np.float32), "bias": np.arange(2, dtype=np.float32)}


def write_pickle(path: Path, content: Any, protocol: int = 2) -> str:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


def train(config_file: str, *overrides: str, resume: bool = False, eval_only: bool = False) -> None:
    cfg = load_config(config_file, overrides)
    run(cfg, Namespace(config_file=config_file, resume=resume, eval_only=eval_only, opts=overrides))


def one_sentence(error: pytest.ExceptionInfo[UserError], path: Path | str) -> None:
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert "weights_only" not in text
    assert not re.search(r"\. [A-Z]", text)


def refusal(path: Path, content: Any, *, pickled: bool) -> pytest.ExceptionInfo[UserError]:
    """Writes a file that is no checkpoint; the one sentence with which it is refused."""
    if pickled:
        write_pickle(path, content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        AtomicCheckpointer(nn.Linear(3, 2)).load(str(path))
    one_sentence(error, path)
    return error


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
@pytest.mark.parametrize("saver", ["pickle", "torch"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, name: str, saver: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / name
    content = {"model": {"weight": Malicious(trace)}}
    error = refusal(path, content, pickled=saver == "pickle")
    if saver == "pickle" or name.endswith(".pth"):
        assert "refused" in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("numpy.dtypes", "Float32DType.mro"), ("numpy", "load")],
)
def test_a_name_that_is_no_array_is_refused(tmp_path: Path, module: str, name: str) -> None:
    path = tmp_path / "name.pkl"
    content = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)
    )
    path.write_bytes(content + b"\x93.")
    with pytest.raises(UserError, match="holds code"):
        AtomicCheckpointer(nn.Linear(3, 2)).load(str(path))


def test_resume_does_not_run_the_code_of_a_pickle(tmp_path: Path) -> None:
    config_file = write_project(tmp_path)
    output = tmp_path / "output"
    output.mkdir()
    write_pickle(output / "evil.pkl", {"model": {}, "trainer": Malicious(tmp_path / "trace")})
    (output / "last_checkpoint").write_text("evil.pkl")
    with pytest.raises(UserError, match="holds code"):
        train(config_file, resume=True)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": weights},
        lambda weights: {"model": OrderedDict(weights), "__author__": "me", "n": np.float64(1)},
        lambda weights: weights,
        lambda weights: {"blobs": {**weights, "weight_momentum": np.zeros(1)}},
    ],
    ids=["model", "author", "bare", "blobs"],
)
def test_a_pickle_of_arrays_is_loaded(tmp_path: Path, wrap: Any, protocol: int) -> None:
    model = nn.Linear(3, 2)
    path = write_pickle(tmp_path / "arrays.pkl", wrap(arrays()), protocol)
    AtomicCheckpointer(model).load(path)
    assert torch.equal(model.weight, torch.full((2, 3), 2.0))
    assert model.bias.tolist() == [0, 1]


@pytest.mark.parametrize("ending", ["pth", "pkl"])
@pytest.mark.parametrize(
    "content",
    [[1, 2], "text", 3, None, {"foo": {"weight": 1}}, {"model": {}}, {"model": [1]}, {}, {1: 2}],
    ids=str,
)
def test_a_file_without_weights_is_a_sentence(tmp_path: Path, content: Any, ending: str) -> None:
    path = tmp_path / f"other.{ending}"
    refusal(path, content, pickled=ending == "pkl")


@pytest.mark.parametrize("ending", ["pth", "pkl"])
@pytest.mark.parametrize("content", [b"hello", b"", b"PK", b"\x80", b"version https://git-lfs\n"])
def test_a_file_that_is_no_checkpoint_is_a_sentence(
    tmp_path: Path, content: bytes, ending: str
) -> None:
    path = tmp_path / f"text.{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded") as error:
        AtomicCheckpointer(nn.Linear(3, 2)).load(str(path))
    one_sentence(error, path)


@pytest.fixture
def trained(tmp_path: Path) -> str:
    config_file = write_project(tmp_path)
    train(config_file, "train.max_iter=1")
    return config_file


@pytest.mark.parametrize("change", ["shape", "missing", "unexpected", "optimizer", "weights only"])
def test_resume_refuses_the_checkpoint_of_another_config(
    trained: str, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "output" / "model_final.pth"
    content = torch.load(path, weights_only=True)
    model = content["model"]
    if change == "shape":
        model["classes.weight"] = torch.zeros(80, 8)
    elif change == "missing":
        del model["classes.weight"]
    elif change == "unexpected":
        model["masks.weight"] = torch.zeros(1)
    elif change == "optimizer":
        content["trainer"]["optimizer"]["param_groups"].pop()
    else:
        del content["trainer"]
    torch.save(content, path)
    match = "no state of a training" if change == "weights only" else "does not belong to this"
    with pytest.raises(UserError, match=match) as error:
        train(trained, "train.max_iter=2", resume=True)
    one_sentence(error, path)


def test_training_removes_unfinished_checkpoints(tmp_path: Path) -> None:
    config_file = write_project(tmp_path)
    output = tmp_path / "output"
    output.mkdir()
    kept = ["other.partial.pth", "model_0000001.partial.txt", "model_0000001.pth"]
    for name in ("model_0000003.partial.pth", "model_final.partial.pth", *kept):
        (output / name).write_bytes(b"half")
    train(config_file, "train.max_iter=1")
    names = {path.name for path in output.iterdir()}
    assert names >= {*kept, "model_final.pth"}
    assert not names & {"model_0000003.partial.pth", "model_final.partial.pth"}


def test_evaluation_of_random_weights_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config_file = write_project(tmp_path)
    with caplog.at_level(logging.WARNING, logger="efficient_detr"):
        train(config_file, "train.max_iter=1", "dataloader.evaluator=null")
        assert "random" not in caplog.text
        train(config_file, eval_only=True)
    assert "the weights are random and the predictions meaningless" in caplog.text
