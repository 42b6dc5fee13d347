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
