"""The command that counts: its tables and file, on small images, and its errors."""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from efficient_detr.evaluation.structure import describe_structure
from tests.engine.tiny import FOCUS_DETR, write_project
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
CLUSTERED = """
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from tests.tiny_models import PatchBackbone
model = LazyConfig.load("{act_detr}", "act_detr")(
    backbone=L(PatchBackbone)(widths=[8, 12, 16]), in_channels=(16,), channels=16, num_heads=2,
    hidden_channels=24, encoder_layers=1, decoder_layers=1, rounds=1, min_tokens=0,
)
"""

with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(ROOT / "tools"))
    analyze_model: Any = importlib.import_module("analyze_model")
    analysis_report: Any = importlib.import_module("kernel_benchmark.analysis_report")


def run(*command: str) -> int:
    status: int = analyze_model.main(["--config-file", *command])
    return status


def rows_of(text: str, title: str = "") -> dict[str, dict[str, str]]:
    """The first table after a title: config -> column -> cell."""
    lines = text[text.index(title) :].splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| config"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[begin:])
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


@pytest.fixture
def clustered(tmp_path: Path) -> str:
    path = tmp_path / "clustered.py"
    act_detr = ROOT / "configs" / "common" / "models" / "act_detr.py"
    path.write_text(CLUSTERED.replace("{act_detr}", act_detr.as_posix()))
    return str(path)


def test_all_tasks_for_two_configs(
    clustered: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One table, whose numbers are those of the file, and what is equal for both at once."""
    path = tmp_path / "made" / "analysis.json"
    tasks = ("--tasks", "flop", "parameter", "activation", "structure")
    size = ("--image-size", "64", "96")
    assert run(QUICKSTART, clustered, *tasks, *size, "--json", str(path)) == 0
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert path.read_text().endswith("}\n")
    assert (found["image_size"], found["inputs"], found["overrides"]) == ([64, 96], 1, [])
    assert list(found["configs"]) == ["quickstart", "clustered"]
    rows = rows_of(printed)
    for name, entry in found["configs"].items():
        gflops = dict(entry["gflops"])
        total = gflops.pop("total")
        assert total == pytest.approx(sum(gflops.values()))
        assert {"backbone", "neck", "encoder", "decoder", "heads"} <= gflops.keys()
        assert rows[name]["GFLOPs"] == f"{total:.4f}"
        assert rows[name]["heads"] == f"{gflops['heads']:.4f}"
        parameters = entry["parameters"]
        assert parameters["total"] == sum(parameters["stages"].values())
        assert rows[name]["parameters (M)"] == f"{parameters['total'] / 1e6:.4f}"
        activations = entry["activations"]
        assert activations.pop("total") == sum(activations.values()) > 0
        assert "aten::add" in entry["uncounted"]
        assert "gflops_spread" not in entry
        assert entry["checkpoint"] is None and entry["image_sizes"] == [[64, 96]]
    assert rows["clustered"]["selection"] == ""
    assert found["configs"]["quickstart"]["data"]["tokens-encoder-0"] > 0
    data = found["configs"]["clustered"]["data"]
    assert {"clusters-encoder-0", "cluster-ratio-encoder-0"} <= data.keys()
    assert f"most-clusters-encoder-0 {data['most-clusters-encoder-0']:.1f}" in printed
    assert "padded to the head with most" in printed
    assert "efficient_detr::lsh_group" in found["configs"]["clustered"]["uncounted"]
    assert "Clusters of random weights mean little (clustered)" in printed
    assert rows_of(printed, "Parameters (M) by stage")["quickstart"]["total"] == "0.8186"
    assert "│ │ backbone: ResNet" in printed


def test_means_over_images_of_the_test_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures that lie and stand; the smaller ones cost less."""
    config = write_project(tmp_path, model=FOCUS_DETR)
    path = tmp_path / "analysis.json"
    overrides = ("--opts", "dataloader.test.mapper.augmentations.0.short_edge_length=64")
    overrides += ("dataloader.test.mapper.augmentations.0.max_size=72",)
    assert run(config, "--num-inputs", "3", "--json", str(path), *overrides) == 0
    found = json.loads(path.read_text())
    entry = found["configs"]["config"]
    assert (found["image_size"], found["inputs"], entry["inputs"]) == (None, 3, 3)
    assert entry["gflops"].keys() == entry["gflops_spread"].keys()
    assert entry["image_sizes"] == [[58, 72], [72, 58], [58, 72]]
    assert found["overrides"] == list(overrides[1:])
    printed = capsys.readouterr().out
    mean, spread = entry["gflops"]["total"], entry["gflops_spread"]["total"]
    assert rows_of(printed)["config"]["GFLOPs"] == f"{mean:.4f} ± {spread:.4f}"
    assert not any("0.0000 ± 0.0000" in cells.values() for cells in rows_of(printed).values())
    assert "first 3 images of the test set" in printed


def test_spread_is_that_of_the_images() -> None:
    counts = [
        analysis_report.FlopCount(
            total=total,
            stages={"encoder": total},
            activations={"encoder": 1},
            operators={},
            uncounted={},
            image_sizes=[(6, total)],
            data={"tokens-total": total},
        )
        for total in (10, 14, 18)
    ]
    parameters = analysis_report.ParameterCount(1, 1, {"encoder": 1}, {"encoder": 1})
    one = analysis_report.Analysis("name", counts, parameters, None, "weights.pth")
    entry = analysis_report._entry(one)
    assert entry["gflops"] == {"encoder": 14e-9, "total": 14e-9}
    assert entry["gflops_spread"]["total"] == pytest.approx(statistics.stdev([10, 14, 18]) / 1e9)
    assert entry["data"] == {"tokens-total": 14}
    assert entry["image_sizes"] == [(6, 10), (6, 14), (6, 18)]
    assert entry["checkpoint"] == "weights.pth"


def test_columns_of_next_to_nothing_are_hidden() -> None:
    rows = {"a": {"x": [1e-7, 2e-7], "y": [1.0, 2.0]}, "b": {"x": [0.0], "y": [3.0]}}
    (header, *_) = analysis_report.stage_table(rows).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["config", "y"]


def test_activations_alone_leave_the_file_complete(tmp_path: Path) -> None:
    path = tmp_path / "analysis.json"
    size = ("--image-size", "64", "96")
    assert run(QUICKSTART, "--tasks", "activation", *size, "--json", str(path)) == 0
    entry = json.loads(path.read_text())["configs"]["quickstart"]
    assert entry["gflops"]["total"] > 0 and entry["activations"]["total"] > 0
    assert entry["uncounted"]


def test_an_interruption_keeps_the_finished_configs(
    clustered: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    analyze = analyze_model.analyze

    def interrupted(file: str, *others: Any) -> Any:
        if file == clustered:
            raise KeyboardInterrupt
        return analyze(file, *others)

    monkeypatch.setattr(analyze_model, "analyze", interrupted)
    path = tmp_path / "analysis.json"
    size = ("--image-size", "64", "96")
    assert run(QUICKSTART, clustered, *size, "--json", str(path)) == 130
    printed, errors = capsys.readouterr()
    assert errors.splitlines()[-1] == "Interrupted"
    assert list(rows_of(printed)) == list(json.loads(path.read_text())["configs"]) == ["quickstart"]


def test_parameters_alone_need_no_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(QUICKSTART, "--tasks", "parameter", "--image-size", "1", "1") == 0
    printed = capsys.readouterr().out
    assert rows_of(printed)["quickstart"] == {
        "config": "quickstart",
        "parameters (M)": "0.8186",
        "trainable (M)": "0.8186",
    }
    assert "not counted" not in printed


def test_structure_merges_equal_neighbours() -> None:
    model = tiny_model("dino", decoder_layers=3)
    lines = describe_structure(model, depth=4).splitlines()
    layer = sum(p.numel() for p in model.detector.decoder.layers[0].parameters())
    (line,) = (line for line in lines if "3 x DecoderLayer" in line)
    assert line.startswith("│ │ │ │ 0-2: 3 x DecoderLayer")
    assert line.endswith(f"{layer:,} each")
    total = sum(p.numel() for p in model.parameters())
    assert lines[1].split() == ["EfficientDETR", f"{total:,}"]
    assert len(describe_structure(model, depth=0).splitlines()) == 2


def test_a_model_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are counted and written, and the error comes at the end."""
    lacking = tmp_path / "lacking.py"
    lacking.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from tests.engine.lacking import Lacking\n"
        "model = L(Lacking)(package='absent_package')\n"
    )
    swin = str(ROOT / "configs" / "backbones" / "swin_tiny.py")
    broken = tmp_path / "broken.py"
    broken.write_text("import absent_package\n")
    path = tmp_path / "analysis.json"
    size = ("--image-size", "8", "8")
    command = (str(broken), str(lacking), QUICKSTART, swin, *size, "--json", str(path))
    assert run(*command) == 2
    printed, errors = capsys.readouterr()
    assert list(rows_of(printed)) == list(json.loads(path.read_text())["configs"]) == ["swin_tiny"]
    loading, first, second = errors.splitlines()[-3:]
    assert loading.startswith(f"Error: {broken} is left out: The config file {broken} cannot be l")
    assert first.startswith(f"Error: {lacking} is left out: model needs the package absent_package")
    assert f"{QUICKSTART} is left out: its model cannot take images of 8 x 8 pixels" in second


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ((QUICKSTART, "--image-size", "0", "8"), "--image-size 0 8: give 1 pixel or more"),
        ((QUICKSTART, "--num-inputs", "0"), "--num-inputs 0: give 1 image or more"),
        (
            (QUICKSTART, "--num-inputs", "2", "--image-size", "800", "1333"),
            "--image-size and --num-inputs exclude each other",
        ),
        (("a/x.py", QUICKSTART, "b/x.py"), "--config-file: a/x.py, b/x.py must differ in name"),
        ((QUICKSTART, "missing.py"), "missing.py does not exist"),
        ((QUICKSTART, "--json", str(ROOT / "tools")), "--json"),
        ((QUICKSTART, "--opts", "model.num_clases=3"), "model.num_classes"),
        ((str(ROOT / "configs/common/optim.py"),), "optim.py: The config lacks model"),
        (
            (str(ROOT / "configs/backbones/swin_tiny.py"), "--num-inputs", "2"),
            "swin_tiny.py: It has no dataloader.test",
        ),
        (
            (QUICKSTART, "--opts", "train.init_checkpoint=absent.pth"),
            "The checkpoint absent.pth does not exist",
        ),
    ],
)
def test_errors_come_before_any_work(
    command: tuple[str, ...],
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(analyze_model, "build_model", None)
    assert run(*command) == 2
    assert text in capsys.readouterr().err


def test_a_missing_data_set_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_project(tmp_path)
    (tmp_path / "val.json").unlink()
    assert run(config, "--num-inputs", "2") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Error: {config}: ")
    assert "val.json" in error


def test_an_image_too_large_is_a_sentence_and_folders_are_made_late(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "analysis.json"
    size = ("--image-size", "1000000", "1000000")
    assert run(QUICKSTART, *size, "--json", str(path)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{QUICKSTART} is left out: --image-size 1000000 1000000: the image cannot be" in error
    assert not path.parent.exists()
