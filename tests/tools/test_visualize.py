"""The command that draws pictures: which files it makes and how it speaks of errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("visualize", ROOT / "tools" / "visualize.py")
assert SPEC is not None and SPEC.loader is not None
visualize = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(visualize)

BACKBONE = """
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from efficient_detr.data.center_square import CenterSquare
from efficient_detr.modeling.backbones.dat_variants import StageSpecification, dat
from efficient_detr.modeling.classifier import ImageClassifier
from tests.tiny_models import MODELS

backbone = dat(
    [
        StageSpecification("L", 8, 2),
        StageSpecification("S", 8, 2),
        StageSpecification("LD", 12, 2, num_groups=2),
        StageSpecification("D", 16, 2),
    ],
    image_size=64,
    out_features=["p1", "p2", "p3"],
)
train = dict(device="cpu", init_checkpoint="", output_dir="output")
"""
CLASSIFIER = """
model = L(ImageClassifier)(backbone=backbone, feature="p3", channels=16, num_classes=3)
preprocessing = L(CenterSquare)(image_size=64)
"""
DETECTOR = """
model = LazyConfig.load(str(MODELS / "{family}.py"), "{family}")(
    backbone=backbone,
    in_features=["p3"],
    in_channels=[16],
    num_classes=3,
    channels=16,
    num_heads=2,
    hidden_channels=16,
    encoder_layers=1,
    decoder_layers=1,
    num_queries=4,
)
"""
RESNET = """
from tests.tiny_models import PatchBackbone
model.detector.backbone = L(PatchBackbone)(widths=[8, 12, 16])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Configs, two pictures and a file that is no picture."""
    detector = DETECTOR.format(family="detr")
    (tmp_path / "classifier.py").write_text(BACKBONE + CLASSIFIER)
    (tmp_path / "detector.py").write_text(BACKBONE + detector)
    (tmp_path / "resnet.py").write_text(BACKBONE + detector + RESNET)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, (height, width) in {"a.png": (60, 90), "b.jpg": (90, 60)}.items():
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / name)
    (pictures / "broken.png").write_text("no picture")
    return tmp_path


def run(folder: Path, *arguments: str, config: str = "classifier") -> int:
    command = ["sampling-points", "--config-file", str(folder / f"{config}.py")]
    command += ["--input", str(folder / "pictures"), "--output", str(folder / "out")]
    return int(visualize.main([*command, *arguments]))


@pytest.mark.parametrize("config", ["classifier", "detector"])
def test_pictures(folder: Path, config: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["--stage", "2", "--block", "-1", "--query", "0.4", "0.6", "--query", "0", "1"]
    assert run(folder, *arguments, config=config) == 0
    made = sorted((folder / "out").iterdir())
    assert [file.name for file in made] == ["a_sampling_points.png", "b_sampling_points.png"]
    # Three panels; the detector sees the whole of both pictures, the classifier a square of each.
    sizes = [Image.open(file).size for file in made]
    assert all(width > 2 * height for width, height in sizes)
    assert (sizes[0][1] < sizes[1][1]) == (config == "detector")
    # Random weights are the same ones again.
    before = [file.read_bytes() for file in made]
    assert run(folder, *arguments, config=config) == 0
    assert [file.read_bytes() for file in made] == before
    messages = [record.getMessage() for record in caplog.records]
    assert any("untrained weights say little" in message for message in messages)
    assert any("broken.png cannot be read" in message for message in messages)


def test_overrides_decide(folder: Path) -> None:
    """Without the square's 64 pixels, the last stage has other cells, but the picture is made."""
    assert run(folder, "--stage", "3", "--head", "1", "--opts", "preprocessing.image_size=96") == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--stage", "1"], "blocks 1 of stage 2; 0 of stage 3 have it"),
        (["--block", "0"], "Block 0 of stage 2 has no deformed sampling points"),
        (["--query", "0.5", "1.5"], "The query 0.5 1.5 lies outside the image"),
        (["--group", "2"], "no group 2: groups are 0 to 1"),
        (["--head", "-1"], "no head -1"),
        (["--weights", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--input", "nothing/*.png"], "names no picture"),
        (["--input", ""], "--input '' names no picture"),
    ],
)
def test_errors(
    folder: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, *arguments) == 2
    assert text in capsys.readouterr().err


def test_wrong_places_are_found_before_the_model_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visualize, "build_predictor", lambda config: pytest.fail("was built"))
    assert run(folder, "--stage", "0") == 2
    assert run(folder, "--query", "2", "2") == 2
    assert not (folder / "out").exists()


def test_another_backbone_has_no_points(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, config="resnet") == 2
    assert "configs/focus_detr_dat_tiny.py" in capsys.readouterr().err


def test_a_config_without_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "part.py").write_text("train = dict(device='cpu', init_checkpoint='')")
    assert run(folder, config="part") == 2
    assert "The config lacks model" in capsys.readouterr().err


def test_a_folder_in_the_place_of_a_picture(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "out" / "a_sampling_points.png").mkdir(parents=True)
    assert run(folder) == 0
    messages = [record.getMessage() for record in caplog.records]
    assert any("a_sampling_points.png cannot be written: Is a dir" in text for text in messages)
    assert (folder / "out" / "b_sampling_points.png").is_file()


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
@pytest.mark.parametrize("config", ["classifier", "detector"])
def test_a_picture_of_one_pixel(folder: Path, config: str) -> None:
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    assert run(folder, "--input", str(folder / "pixel.png"), config=config) == 0


def test_no_picture_at_all(folder: Path) -> None:
    for name in ("a.png", "b.jpg"):
        (folder / "pictures" / name).unlink()
    assert run(folder) == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["sampling-points", "--help"]):
        with pytest.raises(SystemExit) as end:
            visualize.main(arguments)
        assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--config-file" in printed
    assert "for a classifier of those of the square" in printed
