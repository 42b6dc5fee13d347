"""The command that classifies pictures: its table and its sentences about errors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from PIL import Image

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("classify", ROOT / "tools" / "classify.py")
assert SPEC is not None and SPEC.loader is not None
classify = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(classify)

CONFIG = """
from detectron2.config import LazyCall as L
from efficient_detr.data.center_square import CenterSquare
from efficient_detr.modeling.backbones.dat_variants import StageSpecification, dat
from efficient_detr.modeling.classifier import ImageClassifier

model = L(ImageClassifier)(
    backbone=dat(
        [
            StageSpecification("L", 4, 1),
            StageSpecification("L", 8, 2),
            StageSpecification("D", 16, 4, num_groups=2),
            StageSpecification("D", 32, 4, num_groups=2),
        ],
        image_size=64,
        window=4,
        out_features=["p3"],
    ),
    feature="p3",
    channels=32,
    num_classes=3,
)
preprocessing = L(CenterSquare)(image_size=64)
train = dict(device="cpu", init_checkpoint="", output_dir="output")
"""

# (red, green, blue) of the pictures; the model of `weights` tells the first two apart.
COLOURS = {"red.png": (250, 0, 0), "green.jpg": (0, 250, 0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config, pictures of one colour, a file that is no picture, and class names."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, colour in COLOURS.items():
        Image.fromarray(np.full((90, 120, 3), colour, dtype=np.uint8)).save(pictures / name)
    (pictures / "broken.png").write_text("no picture")
    (tmp_path / "names.txt").write_text("a red thing\na green thing\nnothing\n\n")
    return tmp_path


@pytest.fixture
def weights(folder: Path) -> Path:
    """Weights with which red pictures are of class 0 and green ones of class 1.

    The head looks along the difference of what the backbone makes of the two colours.
    """
    torch.manual_seed(0)
    model: Any = instantiate(LazyConfig.load(str(folder / "tiny.py")).model).eval()
    with torch.no_grad():
        images = [
            {"image": torch.tensor(colour)[:, None, None].expand(3, 64, 64)}
            for colour in COLOURS.values()
        ]
        red, green = model.backbone(model.preprocess(images))["p3"].mean((2, 3))
        direction = (red - green) / (red - green).square().sum()
        middle = direction @ (red + green) / 2
        model.head.weight.copy_(torch.stack([8 * direction, -8 * direction, 0 * direction]))
        model.head.bias.copy_(torch.stack([-8 * middle, 8 * middle, 0 * middle]))
    path = folder / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def run(folder: Path, *arguments: str, config: str = "tiny") -> int:
    command = ["--config-file", str(folder / f"{config}.py"), "--input", str(folder / "pictures")]
    return int(classify.main([*command, *arguments]))


def table_in(printed: str) -> list[list[str]]:
    """The cells of the table below its head, among which the log may stand."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.mark.parametrize("named", [True, False])
def test_table(
    folder: Path,
    weights: Path,
    named: bool,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Logits of the three classes are 4, -4 and 0 for red: 98.17 %, 0.03 % and 1.80 %."""
    names = ["--classes", str(folder / "names.txt")] if named else []
    assert run(folder, "--weights", str(weights), "--top", "2", *names) == 0
    cells = table_in(capsys.readouterr().out)
    classes = ["a green thing", "nothing", "a red thing", "nothing"] if named else list("1202")
    assert [cell[1] for cell in cells] == classes
    for cell in cells:  # JPEG and the resizing change a colour a little
        shown = float(cell[2].removesuffix(" %"))
        assert shown == pytest.approx(1.80 if cell[1] in ("2", "nothing") else 98.17, abs=0.1)
    paths = [str(folder / "pictures" / name) for name in ("green.jpg", "red.png")]
    assert [cell[0] for cell in cells] == [paths[0], "", paths[1], ""]
    messages = [record.getMessage() for record in caplog.records]
    assert any("broken.png cannot be read" in message for message in messages)
    assert not any("weights are random" in message for message in messages)


def test_without_weights(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """There is a warning; no more classes are shown than there are."""
    assert run(folder) == 0
    cells = table_in(capsys.readouterr().out)
    assert len(cells) == 2 * 3
    assert sum(float(cell[2].split()[0]) for cell in cells[:3]) == pytest.approx(100, abs=0.02)
    assert any("the weights are random" in record.getMessage() for record in caplog.records)


def test_names_in_json(folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "names.json").write_text(json.dumps(["rot", "grün", "nichts"]), encoding="utf-8")
    arguments = ["--classes", str(folder / "names.json"), "--top", "1"]
    assert run(folder, "--weights", str(weights), *arguments) == 0
    assert [cell[1] for cell in table_in(capsys.readouterr().out)] == ["grün", "rot"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("two.txt", b"one\ntwo\n", "two.txt holds 2 names, but the model has 3 classes"),
        ("two.json", b'["one", "two"]', "two.json holds 2 names"),
        ("broken.json", b"[", "is not valid JSON"),
        ("dict.json", b'{"0": "one"}', "must hold a list of names"),
        ("latin.txt", b"\xe4\n\xf6\n\xfc\n", "latin.txt cannot be read: it is no UTF-8 text"),
        ("missing.txt", None, "missing.txt cannot be read: No such file"),
    ],
)
def test_wrong_class_names(
    folder: Path, name: str, content: bytes | None, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (folder / name).write_bytes(content)
    assert run(folder, "--classes", str(folder / name)) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--top", "0"], "--top 0: show 1 class or more"),
        (["--weights", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--opts", "preprocessing.size=3"], "no key 'preprocessing.size'"),
        (["--opts", "model.channels=16"], "model.channels=16, but p3 of the backbone has 32"),
    ],
)
def test_errors(
    folder: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, *arguments) == 2
    printed = capsys.readouterr()
    assert text in printed.err and not table_in(printed.out)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (CONFIG.replace("preprocessing", "other"), "has no preprocessing"),
        (CONFIG + "model = model.backbone\n", "model is a DAT, not a classifier"),
    ],
)
def test_configs_of_something_else(
    folder: Path, config: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "other.py").write_text(config)
    assert run(folder, config="other") == 2
    assert text in capsys.readouterr().err


def test_a_size_that_the_model_cannot_take(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """All pictures are left out, each with the reason."""
    assert run(folder, "--opts", "preprocessing.image_size=16") == 1
    assert not table_in(capsys.readouterr().out)
    messages = [record.getMessage() for record in caplog.records]
    assert any(
        "red.png is left out: The model cannot take images of 16 x 16" in m for m in messages
    )


def test_no_picture_at_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in COLOURS:
        (folder / "pictures" / name).unlink()
    assert run(folder) == 1
    assert not table_in(capsys.readouterr().out)
