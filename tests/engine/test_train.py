"""Training and evaluation of a whole config on a tiny detector."""

import json
import logging
import math
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from efficient_detr.engine.checks import load_config
from efficient_detr.engine.train import do_test, run, save_results
from efficient_detr.errors import UserError
from tests.engine.tiny import FOCUS_DETR, write_project


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    return write_project(tmp_path)


def train(config_file: str, *overrides: str, resume: bool = False, eval_only: bool = False) -> Any:
    cfg = load_config(config_file, overrides)
    args = Namespace(config_file=config_file, resume=resume, eval_only=eval_only, opts=overrides)
    return run(cfg, args)


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return state


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


def resume_in(copy: Path, original: Path, checkpoint: str) -> None:
    """The state of the output folder just after ``checkpoint`` had been written."""
    copy.mkdir()
    shutil.copy(original / checkpoint, copy / checkpoint)
    (copy / "last_checkpoint").write_text(checkpoint)


@pytest.mark.parametrize("options", [(), ("train.amp.enabled=True", "train.amp.dtype=float16")])
@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_equals_uninterrupted(
    config_file: str, tmp_path: Path, options: tuple[str, ...], workers: int
) -> None:
    """4 + 4 iterations give the weights, moments and schedule of 8, bit for bit.

    The learning rate drops at 5 of 8 iterations, augmentations and noise are random, and 4 batches
    of 2 leave the first epoch of 6 images in its middle.
    """
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(config_file, f"train.output_dir={whole}", *options)
    resume_in(halves, whole, "model_0000003.pth")
    loader = f"dataloader.train.num_workers={workers}"
    train(config_file, f"train.output_dir={halves}", loader, *options, resume=True)

    expected, actual = (
        torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole, halves)
    )
    assert expected["iteration"] == actual["iteration"] == 7
    for name, weight in expected["model"].items():
        assert torch.equal(weight, actual["model"][name]), name
    for index, moments in expected["trainer"]["optimizer"]["state"].items():
        other = actual["trainer"]["optimizer"]["state"][index]
        assert all(torch.equal(moments[key], other[key]) for key in moments)
    assert expected["trainer"]["hooks"] == actual["trainer"]["hooks"]
    assert expected["trainer"]["grad_scaler"] == actual["trainer"]["grad_scaler"]


def test_interrupted_equals_uninterrupted_for_focus_detr(tmp_path: Path) -> None:
    """The project's own model, whose denoising queries draw noise in every step."""
    config_file = write_project(tmp_path, model=FOCUS_DETR)
    mapper = "dataloader.train.mapper"
    overrides = (
        f"{mapper}.augmentations.1.short_edge_length=[64, 80]",
        f"{mapper}.crop_augmentations=null",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "train.amp.enabled=True",
    )
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(config_file, f"train.output_dir={whole}", *overrides)
    resume_in(halves, whole, "model_0000003.pth")
    train(config_file, f"train.output_dir={halves}", *overrides, resume=True)
    expected, actual = weights(whole / "model_final.pth"), weights(halves / "model_final.pth")
    start = weights(whole / "model_0000003.pth")
    assert any(not torch.equal(start[name], weight) for name, weight in expected.items())
    for name, weight in expected.items():
        assert torch.equal(weight, actual[name]), name
    results = json.loads((halves / "results.json").read_text())
    assert results["flops"]["GFLOPs"] > 0


def test_same_seed_same_run_other_seed_other_run(config_file: str, tmp_path: Path) -> None:
    finals = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(config_file, f"train.output_dir={tmp_path / folder}", f"train.seed={seed}")
        finals.append(weights(tmp_path / folder / "model_final.pth"))
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])
    assert any(not torch.equal(finals[0][k], finals[2][k]) for k in finals[0])


def test_training_lowers_the_loss_and_leaves_its_files(config_file: str, tmp_path: Path) -> None:
    train(config_file, "train.max_iter=60", "optimizer.lr=0.03", "train.log_period=10")
    output = tmp_path / "output"
    curve = losses(output)
    assert curve[59] < 0.8 * curve[9]
    names = {path.name for path in output.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "results.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if "partial" in name]
    results = json.loads((output / "results.json").read_text())
    assert 0 <= results["bbox"]["AP50"] <= 100
    assert results["flops"]["parameters"] > 0


def test_evaluation_only_gives_what_the_end_of_training_gave(
    config_file: str, tmp_path: Path
) -> None:
    train(config_file)
    after_training = json.loads((tmp_path / "output" / "results.json").read_text())
    overrides = (
        f"train.init_checkpoint={tmp_path}/output/model_final.pth",
        f"train.output_dir={tmp_path}/evaluation",
    )
    results = train(config_file, *overrides, eval_only=True)
    for name, value in after_training["bbox"].items():
        same = results["bbox"][name]
        assert same == pytest.approx(value) if value is not None else math.isnan(same)


def test_resume_without_a_checkpoint_starts_fresh_and_says_so(
    config_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="efficient_detr"):
        train(config_file, "train.max_iter=2", resume=True)
    assert "No checkpoint in" in caplog.text
    assert (tmp_path / "output" / "model_final.pth").exists()


def test_initial_weights_of_another_shape_are_taken_in_part_if_allowed(
    config_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config_file)
    source = weights(tmp_path / "output" / "model_final.pth")
    wide = {**source, "classes.weight": torch.zeros(80, 8), "classes.bias": torch.zeros(80)}
    torch.save({"model": wide}, tmp_path / "eighty.pth")
    overrides = (
        f"train.init_checkpoint={tmp_path}/eighty.pth",
        f"train.output_dir={tmp_path}/tuned",
        "train.max_iter=1",
        "optimizer.lr=0.0",
    )
    with pytest.raises(UserError, match=r"eighty\.pth .*config\.py.*80x8 instead of 3x8") as error:
        train(config_file, *overrides)
    assert f"the config {config_file}" in str(error.value)
    with caplog.at_level(logging.WARNING, logger="efficient_detr"):
        train(config_file, *overrides, "+train.allow_partial_checkpoint=True")
    assert "classes.weight (80x8 instead of 3x8)" in caplog.text
    tuned = weights(tmp_path / "tuned" / "model_final.pth")
    assert torch.equal(tuned["boxes.weight"], source["boxes.weight"])
    assert tuned["classes.weight"].shape == (3, 8)


def test_only_the_last_checkpoints_are_kept(config_file: str, tmp_path: Path) -> None:
    train(config_file, "train.checkpointer.period=2", "train.checkpointer.max_to_keep=1")
    names = sorted(path.name for path in (tmp_path / "output").glob("*.pth"))
    assert names == ["model_0000007.pth", "model_final.pth"]


def test_periodic_evaluation_reaches_the_metrics(config_file: str, tmp_path: Path) -> None:
    train(config_file, "train.eval_period=4")
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    evaluated = [json.loads(line)["iteration"] for line in lines if "bbox/AP50" in line]
    assert 3 in evaluated
    assert len(evaluated) == 2


def test_a_damaged_checkpoint_is_a_sentence(config_file: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"PK not a checkpoint")
    with pytest.raises(UserError, match=r"broken\.pth cannot be loaded"):
        train(config_file, f"train.init_checkpoint={broken}")


def test_weights_of_another_model_are_refused(config_file: str, tmp_path: Path) -> None:
    torch.save({"model": {"resnet.conv1": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth .*resnet\.conv1"):
        train(config_file, f"train.init_checkpoint={tmp_path}/other.pth")


def test_a_killed_save_leaves_the_previous_checkpoint(
    config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efficient_detr.engine.checkpointer import AtomicCheckpointer

    model = torch.nn.Linear(2, 2)
    checkpointer = AtomicCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")

    def die(data: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_0000002")
    monkeypatch.undo()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert not (tmp_path / "model_0000002.pth").exists()
    checkpointer.load(checkpointer.get_checkpoint_file())


def test_without_an_evaluator_nothing_is_evaluated(config_file: str) -> None:
    cfg = load_config(config_file, ["dataloader.evaluator=null"])
    assert do_test(cfg, torch.nn.Linear(1, 1)) == {}


def test_results_are_valid_json_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    save_results({"bbox": {"AP": 12.5, "APl": float("nan")}}, str(path))
    assert json.loads(path.read_text()) == {"bbox": {"AP": 12.5, "APl": None}}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
