"""The command that measures clusters: its table, its files and its sentences about errors."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("measure", ROOT / "tools" / "measure_clusters.py")
assert SPEC is not None and SPEC.loader is not None
measure_clusters = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(measure_clusters)

CONFIG = """
from detectron2.config import LazyCall as L
from efficient_detr.engine.predictor import Predictor
from tests.tiny_models import MODELS, PatchBackbone
from detectron2.config import LazyConfig

model = LazyConfig.load(str(MODELS / "{model}.py"), "{model}")(
    backbone=L(PatchBackbone)(widths=[8, 12, 16]),
    in_features=["res3"],
    in_channels=[8],
    num_classes=3,
    channels=16,
    num_heads=2,
    hidden_channels=16,
    encoder_layers=2,
    decoder_layers=1,
    num_queries=4,
)
train = dict(device="cpu", init_checkpoint="", output_dir="output")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Configs and two pictures of other sizes, and a file that is no picture."""
    for model in ("act_detr", "detr"):
        (tmp_path / f"{model}.py").write_text(CONFIG.format(model=model))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, (height, width) in {"a": (64, 96), "b": (80, 48)}.items():
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{name}.png")
    (pictures / "broken.png").write_text("no picture")
    return tmp_path


def run(folder: Path, *arguments: str, config: str = "act_detr") -> int:
    command = ["--config-file", str(folder / f"{config}.py"), "--input", str(folder / "pictures")]
    return int(measure_clusters.main([*command, *arguments]))


def test_table_and_files(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = folder / "out"
    arguments = ["--rounds", "2", "8", "--widths", "1", "4", "--bias", "theory", "--maps"]
    assert run(folder, *arguments, "--output", str(output)) == 0
    header, _, *lines = table_in(capsys.readouterr().out)
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        *("layer", "rounds", "width", "tokens", "clusters", "C/N", "error", "MSE of weights")
    ]
    assert len(lines) == 2 * 4  # layers, ways to hash
    assert {file.name for file in output.iterdir()} == {
        *("clusters.json", "clusters.csv", "curves.png", "clusters.png")
    }
    rows = json.loads((output / "clusters.json").read_text())
    assert len(rows) == 2 * 2 * 4
    # Tokens are patches of 8 x 8 pixels.
    assert [row["tokens"] for row in rows[::8]] == [8 * 12, 10 * 6]
    for row in rows:
        assert row["bias_range"] == row["width"]
        assert row["ratio"] == pytest.approx(row["clusters"] / row["tokens"])
        assert row["map_error"] >= 0
    # More rounds of equal width: never fewer clusters here, and nothing is free of error.
    of_first = [row for row in rows if row["layer"] == 0 and row["width"] == 1]
    assert of_first[1]["clusters"] > of_first[0]["clusters"]
    with open(output / "clusters.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["error"]) for row in read] == [row["error"] for row in rows]
    messages = [record.getMessage() for record in caplog.records]
    assert any("untrained weights mean little" in message for message in messages)
    assert any("broken.png cannot be read" in message for message in messages)


def table_in(printed: str) -> list[str]:
    """The lines of the table, among which the log may stand."""
    return [line for line in printed.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--widths", "0"], "--widths must lie between"),
        (["--layer", "2"], "no layer 2"),
        (["--head", "-1"], "no head -1"),
        (["--weights", "nowhere.pth"], "nowhere.pth does not exist"),
    ],
)
def test_errors(
    folder: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, *arguments) == 2
    printed = capsys.readouterr()
    assert text in printed.err and not table_in(printed.out)


def test_dense_attention_has_no_clusters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, config="detr") == 2
    assert "configs/act_detr.py" in capsys.readouterr().err


def test_no_picture_at_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (folder / "pictures" / f"{name}.png").unlink()
    assert run(folder) == 1
    assert not table_in(capsys.readouterr().out)
