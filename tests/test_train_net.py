"""The command ``train_net.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser

import train_net
from efficient_detr.engine.checks import load_config
from efficient_detr.errors import UserError
from tests.engine.tiny import write_project

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    return write_project(tmp_path)


def test_train_resume_and_evaluate(config_file: str, tmp_path: Path) -> None:
    command = ["--config-file", config_file]
    assert train_net.main([*command, "train.max_iter=2"]) == 0
    assert train_net.main([*command, "--resume", "train.max_iter=4"]) == 0
    final = tmp_path / "output" / "model_final.pth"
    assert torch.load(final, weights_only=True)["iteration"] == 3
    evaluate = ["--eval-only", f"train.init_checkpoint={final}", f"train.output_dir={tmp_path}/e"]
    assert train_net.main([*command, *evaluate]) == 0
    assert "bbox" in json.loads((tmp_path / "e" / "results.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train.max_itr=2"], "did you mean 'train.max_iter'?"),
        (["model.num_classes=80"], "add model.num_classes=3."),
        (["train.init_checkpoint=absent.pth"], "absent.pth does not exist"),
        (["--num-gpus", "99", "train.device=cuda"], "GPU"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    config_file: str, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert train_net.main(["--config-file", config_file, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert captured.out == "", "found before anything was set up"


def test_a_broken_picture_in_training_is_one_line(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for picture in (tmp_path / "train").iterdir():
        picture.write_text("broken")
    assert train_net.main(["--config-file", config_file]) == 2
    captured = capsys.readouterr()
    assert "cannot be read" in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_no_gpus_means_the_cpu(config_file: str, tmp_path: Path) -> None:
    arguments = ["--config-file", config_file, "--num-gpus", "0"]
    assert train_net.main([*arguments, "train.device=cuda", "train.max_iter=1"]) == 0


def test_ctrl_c(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_net, "launch", interrupt)
    assert train_net.main(["--config-file", config_file]) == 130
    assert "--resume" in capsys.readouterr().err


def run_as_program(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "projects"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        timeout=240,
    )


def test_two_processes_train_as_one(config_file: str, tmp_path: Path) -> None:
    """Over gloo on the CPU; the two ranks split the batch, and the main one writes everything."""
    if torch.cuda.is_available():
        pytest.skip("Detectron2 takes NCCL where there is a GPU, and the tiny model is on the CPU")
    done = run_as_program(
        tmp_path,
        "--config-file",
        config_file,
        "--num-gpus",
        "2",
        "--dist-url",
        "auto",
        "train.max_iter=3",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert state["iteration"] == 2
    assert not [name for name in state["model"] if name.startswith("module.")]
    assert "bbox" in json.loads((tmp_path / "output" / "results.json").read_text())


def test_an_error_in_one_of_several_processes_is_a_status_of_its_own(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reports by itself: its exception would reach the main process as a traceback."""
    for picture in (tmp_path / "train").iterdir():
        picture.write_text("broken")
    cfg = load_config(config_file, [])
    args = default_argument_parser().parse_args(["--config-file", config_file, "--num-gpus", "2"])
    with pytest.raises(SystemExit) as left:
        train_net._worker(cfg, args)
    assert left.value.code == 2
    assert "cannot be read" in capsys.readouterr().err


def test_user_errors_keep_their_sentence() -> None:
    assert str(UserError("A sentence: with a colon.")) == "A sentence: with a colon."
