"""A package that a part of the model lacks gives one sentence, in every command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf

import demo
import train_net
from efficient_detr.engine.building import build_model
from efficient_detr.errors import UserError
from tests.engine.lacking import Lacking, Whole, lacking_function
from tests.engine.tiny import write_project

LACKING = "dict(_target_='tests.engine.lacking.Lacking', package='absent_package')"


def sentence(model: Any) -> str:
    with pytest.raises(UserError) as caught:
        build_model(OmegaConf.create({"model": model}, flags={"allow_objects": True}))
    return str(caught.value)


def test_a_sound_model_is_built() -> None:
    config = OmegaConf.create({"model": L(torch.nn.Linear)(in_features=2, out_features=3)})
    assert isinstance(build_model(config), torch.nn.Linear)


def test_the_sentence_names_the_part_and_the_package() -> None:
    lacking = L(Lacking)(package="absent_package.layers")
    assert sentence(L(Whole)(parts=[1, lacking])) == (
        "model.parts.1 needs the package absent_package, which is not installed: pip install "
        "absent_package."
    )
    assert sentence(lacking).startswith("model needs the package absent_package,")


def test_a_function_may_be_the_part() -> None:
    text = sentence(L(Whole)(parts=L(lacking_function)(name="absent_package")))
    assert text.startswith("model.parts needs the package absent_package,")


def test_without_timm_there_is_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not timm is installed here."""
    monkeypatch.setattr("efficient_detr.engine.building.find_spec", lambda name: None)
    parts = L(Whole)(parts=L(lacking_function)(name="timm.models"))
    assert sentence(parts) == (
        "model.parts needs the package timm, which is not installed: pip install timm."
    )
    monkeypatch.setattr("tests.engine.lacking.importlib.import_module", _no_timm)
    assert sentence(L(Whole)(parts=L(Lacking)(package="timm.models"))) == (
        "model.parts needs the package timm, which is not installed: pip install timm, or set "
        "model.parts.drop_path_rate=0."
    )


def _no_timm(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_another_version_of_a_package() -> None:
    assert sentence(L(Lacking)(package="torch.absent_module")) == (
        "model cannot be built: No module named 'torch.absent_module'"
    )


@pytest.mark.parametrize("options", [[], ["--eval-only"]])
def test_training_and_evaluation(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_project(tmp_path, model=LACKING)
    assert train_net.main(["--config-file", config, "--num-gpus", "0", *options]) == 2
    assert "model needs the package absent_package" in capsys.readouterr().err


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_project(tmp_path, model=LACKING)
    command = ["--config-file", config, "--input", str(tmp_path / "val")]
    assert demo.main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "model needs the package absent_package" in capsys.readouterr().err
