"""Checkpoints: files, resuming, foreign weights, matching by the ends of names."""

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(3))
        self.body = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        self.head = nn.Linear(2, 1)


@pytest.fixture(autouse=True)
def _log_reaches_the_test() -> None:
    for name in ("fvcore", "detectron2"):
        logging.getLogger(name).propagate = True


def test_saved_state_comes_back(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_3", iteration=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_3.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_3.pth"
    assert set(torch.load(tmp_path / "model_3.pth")) == {"model", "optimizer", "iteration"}

    other = Net()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=9.0)
    checkpointer = DetectionCheckpointer(other, str(tmp_path), optimizer=other_optimizer)
    assert checkpointer.has_checkpoint()
    rest = checkpointer.resume_or_load("never used.pth", resume=True)
    assert rest["iteration"] == 3
    assert other_optimizer.param_groups[0]["lr"] == 0.5
    torch.testing.assert_close(other.state_dict(), model.state_dict())


def test_without_resume_only_the_model_is_loaded(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_3")
    other = Net()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=9.0)
    checkpointer = DetectionCheckpointer(other, str(tmp_path), optimizer=other_optimizer)
    checkpointer.resume_or_load(str(tmp_path / "model_3.pth"), resume=False)
    assert other_optimizer.param_groups[0]["lr"] == 9.0
    torch.testing.assert_close(other.state_dict(), model.state_dict())


def test_no_path_loads_nothing() -> None:
    assert DetectionCheckpointer(Net()).resume_or_load("", resume=True) == {}


def test_only_a_writer_writes(tmp_path: Path) -> None:
    DetectionCheckpointer(Net(), str(tmp_path), save_to_disk=False).save("a")
    assert not list(tmp_path.iterdir())


def test_bare_state_dicts_and_bad_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    bias_before = model.head.bias.clone()
    weights = {"head.weight": torch.ones(1, 2), "head.bias": torch.ones(7), "other": torch.ones(1)}
    torch.save(weights, tmp_path / "raw.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "raw.pth"))
    assert model.head.weight.tolist() == [[1.0, 1.0]]
    torch.testing.assert_close(model.head.bias, bias_before)
    assert "head.bias" in caplog.text
    assert "other" in caplog.text
    assert "pixel_mean" not in caplog.text, "normalisation belongs to the config"


def test_model_zoo_pickles_are_matched_by_name(tmp_path: Path) -> None:
    weights = {"0.weight": np.full((3, 2), 2.0, np.float32), "1.bias": np.ones(2, np.float32)}
    with open(tmp_path / "R.pkl", "wb") as file:
        content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
        pickle.dump(content, file)
    model = Net()
    DetectionCheckpointer(model).load(str(tmp_path / "R.pkl"))
    assert model.state_dict()["body.0.weight"].unique().tolist() == [2.0]
    assert model.state_dict()["body.1.bias"].tolist() == [1.0, 1.0]


def _load_matched(model: nn.Module, weights: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"model": weights, "matching_heuristics": True}, tmp_path / "a.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "a.pth"))


def test_the_longest_end_of_a_name_wins(tmp_path: Path) -> None:
    model = Net()
    ones, twos = torch.ones(3, 2), torch.full((3, 2), 2.0)
    _load_matched(model, {"weight": ones, "body.0.weight": twos}, tmp_path / ".")
    torch.testing.assert_close(model.state_dict()["body.0.weight"], twos)


def test_one_weight_cannot_fit_two_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError):  # noqa: PT011 (the wording is free)
        _load_matched(model, {"weight": torch.ones(2, 2)}, tmp_path)


def test_names_match_at_dots_only(tmp_path: Path) -> None:
    model = nn.ModuleDict({"my_head": nn.Linear(1, 1, bias=False)})
    before = model.state_dict()["my_head.weight"].clone()
    _load_matched(model, {"head.weight": torch.full((1, 1), 5.0)}, tmp_path)
    torch.testing.assert_close(model.state_dict()["my_head.weight"], before)


def test_unknown_queries_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="colour"):
        DetectionCheckpointer(Net()).load(f"{tmp_path / 'a.pth'}?colour=red")


def test_a_query_asks_for_matching_by_the_ends(tmp_path: Path) -> None:
    torch.save({"model": {"0.weight": torch.full((1, 1), 7.0)}}, tmp_path / "a.pth")
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    DetectionCheckpointer(model).load(f"{tmp_path / 'a.pth'}?matching_heuristics=True")
    assert model.state_dict()["0.0.weight"].item() == 7
