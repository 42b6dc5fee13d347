"""The command that counts, on a small image, and its errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("analyze_model", ROOT / "tools" / "analyze_model.py")
assert SPEC is not None and SPEC.loader is not None
analyze_model = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(analyze_model)


def test_prints_stages_of_each_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "quickstart.py")
    assert analyze_model.main(["--config-file", config, config, "--image-size", "64", "96"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("quickstart.py at 64x96") == 2
    for stage in ("backbone", "neck", "selection", "encoder", "decoder", "total"):
        assert f"| {stage} " in printed
    assert "Operators seen, not counted" in printed


def test_wrong_key_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "quickstart.py")
    status = analyze_model.main(["--config-file", config, "--opts", "model.num_clases=3"])
    assert status == 2
    assert "model.num_classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "size", "text"),
    [
        ("backbones/dat_tiny", (8, 8), "dat_tiny.py cannot take images of 8 x 8 pixels"),
        ("quickstart", (0, 8), "--image-size 0 8: give 1 pixel or more"),
        ("common/optim", (64, 64), "The config lacks model"),
    ],
)
def test_errors(
    config: str, size: tuple[int, int], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    height, width = map(str, size)
    command = ["--config-file", str(ROOT / "configs" / f"{config}.py"), "--image-size"]
    assert analyze_model.main([*command, height, width]) == 2
    assert text in capsys.readouterr().err


def test_a_package_that_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.py"
    path.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from tests.engine.lacking import Lacking\n"
        "model = L(Lacking)(package='absent_package')\n"
    )
    assert analyze_model.main(["--config-file", str(path), "--image-size", "8", "8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: model needs the package absent_package, which is not installed")
