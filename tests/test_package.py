"""`import efficient_detr` and what it says about Detectron2."""

import importlib.util
import runpy
from importlib.machinery import ModuleSpec

import detectron2
import pytest

import efficient_detr

A_MERE_FOLDER = ModuleSpec("detectron2", loader=None, is_package=True)


@pytest.mark.parametrize("found", [None, A_MERE_FOLDER])
def test_import_without_detectron2_names_both_ways_to_install_it(
    found: ModuleSpec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ImportError, match="needs Detectron2") as caught:
        runpy.run_path(str(efficient_detr.__file__))
    assert "facebookresearch/detectron2" in str(caught.value)
    assert "./detectron2_lite" in str(caught.value)
    assert caught.value.name == "detectron2"


def test_description_of_the_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectron2, "__lite__", True, raising=False)
    assert efficient_detr.detectron2_description() == "detectron2: lite"


def test_description_of_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectron2, "__lite__", False, raising=False)
    monkeypatch.setattr(detectron2, "__version__", "0.6")
    assert efficient_detr.detectron2_description() == "detectron2: real 0.6"
