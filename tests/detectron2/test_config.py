"""LazyConfig files: imports by path, overrides, interpolation, and the way to YAML and back."""

import builtins
import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from omegaconf import DictConfig, ListConfig
from torch import nn

BASE = """
from collections import Counter
from detectron2.config import LazyCall as L

model = L(Counter)(apples=1, pears="${.apples}")
train = dict(seed=1, output=dict(folder="a", steps=[1, 2]))
numbers = [1, 2]
_private = dict(a=1)
"""
TOP = """
from .parts.base import model, train
from ..common import schedule

model.apples = 5
train.seed = 2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "common.py").write_text("schedule = dict(length=3)\n")
    (tmp_path / "project" / "parts").mkdir(parents=True)
    (tmp_path / "project" / "parts" / "base.py").write_text(BASE)
    (tmp_path / "project" / "top.py").write_text(TOP)
    return tmp_path / "project"


def test_relative_imports_go_by_path_without_packages(folder: Path) -> None:
    cfg = LazyConfig.load(str(folder / "top.py"))
    assert sorted(cfg) == ["model", "schedule", "train"]
    assert all(isinstance(cfg[key], DictConfig) for key in cfg)
    assert cfg.train.seed == 2
    assert cfg.train.output.folder == "a"
    assert cfg.schedule.length == 3


def test_each_load_runs_the_files_again(folder: Path) -> None:
    cfg = LazyConfig.load(str(folder / "top.py"))
    cfg.model.apples = 100
    cfg.train.output.folder = "edited"
    again = LazyConfig.load(str(folder / "top.py"))
    assert (again.model.apples, again.train.output.folder) == (5, "a")
    assert LazyConfig.load(str(folder / "parts" / "base.py")).model.apples == 1


def test_only_public_configurations_are_loaded(folder: Path) -> None:
    assert sorted(LazyConfig.load(str(folder / "parts" / "base.py"))) == ["model", "train"]


def test_keys_choose_objects_of_any_kind(folder: Path) -> None:
    file = str(folder / "parts" / "base.py")
    assert LazyConfig.load(file, "train").seed == 1
    assert LazyConfig.load(file, "numbers") == [1, 2]
    model, private = LazyConfig.load(file, ("model", "_private"))
    assert (model.apples, private.a) == (1, 1)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from . import base", "relative import"),
        ("from .parts import base", "relative import"),
        ("from .nowhere import base", "not exist"),
    ],
)
def test_bad_imports_say_why(folder: Path, statement: str, message: str) -> None:
    (folder / "bad.py").write_text(statement + "\n")
    with pytest.raises(ImportError, match=message):
        LazyConfig.load(str(folder / "bad.py"))


def test_import_is_ordinary_again_after_a_load(folder: Path) -> None:
    before = builtins.__import__
    LazyConfig.load(str(folder / "top.py"))
    assert builtins.__import__ is before


def test_syntax_errors_name_the_file(folder: Path) -> None:
    (folder / "bad.py").write_text("a = (\n")
    with pytest.raises(SyntaxError, match=r"bad\.py"):
        LazyConfig.load(str(folder / "bad.py"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.txt"):
        LazyConfig.load(str(tmp_path / "config.txt"))


def test_overrides_follow_hydra_in_place(folder: Path) -> None:
    cfg = LazyConfig.load(str(folder / "top.py"))
    overrides = [
        "train.output.steps=[3,4]",
        "train.new.depth=1.5",
        "train.text='1'",
        "model.x=null",
    ]
    assert LazyConfig.apply_overrides(cfg, overrides) is cfg
    assert cfg.train.output.steps == [3, 4]
    assert cfg.train.new.depth == 1.5
    assert cfg.train.text == "1"
    assert cfg.model.x is None


def test_impossible_overrides(folder: Path) -> None:
    cfg = LazyConfig.load(str(folder / "top.py"))
    with pytest.raises(KeyError, match=r"train\.seed"):
        LazyConfig.apply_overrides(cfg, ["train.seed.x=1"])
    with pytest.raises(NotImplementedError):
        LazyConfig.apply_overrides(cfg, ["~train.seed"])


def test_interpolations_follow_edits_also_after_yaml(folder: Path, tmp_path: Path) -> None:
    cfg = LazyConfig.load(str(folder / "top.py"))
    file = str(tmp_path / "saved.yaml")
    LazyConfig.save(cfg, file)
    loaded = LazyConfig.load(file)
    assert loaded.model._target_ == "collections.Counter"
    for each in (cfg, loaded):
        each.model.apples = 7
        assert instantiate(each.model) == Counter(apples=7, pears=7)
    assert cfg.model._target_ is Counter, "saving must not touch the config itself"


def test_yaml_keeps_short_lists_on_one_line(tmp_path: Path) -> None:
    file = tmp_path / "saved.yaml"
    LazyConfig.save(DictConfig({"a": {"steps": [1, 2]}, "wörter": "ä"}), str(file))
    assert file.read_text() == "a:\n  steps: [1, 2]\nwörter: ä\n"


def test_what_yaml_cannot_hold_is_pickled(tmp_path: Path) -> None:
    cfg = DictConfig({"f": lambda: 3}, flags={"allow_objects": True})
    LazyConfig.save(cfg, str(tmp_path / "saved.yaml"))
    assert (tmp_path / "saved.yaml").is_file()
    assert pickle.loads((tmp_path / "saved.yaml.pkl").read_bytes()).f() == 3


class Box:
    def __init__(self, content: Any, *, label: str = "") -> None:
        self.content = content
        self.label = label

    def __call__(self, more: int) -> Any:
        return self.content + more


def test_arguments_and_targets_are_built_first() -> None:
    inner = LazyCall(Box)(content=1, label="${...label}")
    box = instantiate(LazyCall(Box)(content=[inner, 2], label="x"))
    assert isinstance(box.content, (list, ListConfig))
    assert (box.content[0].content, box.content[0].label, box.content[1]) == (1, "x", 2)
    assert instantiate(LazyCall(LazyCall(Box)(content=3))(more=4)) == 7
    assert instantiate({"_target_": "collections.Counter", "a": 2}) == Counter(a=2)


def test_other_values_pass_unchanged() -> None:
    for value in (5, "x", {"a": 1}, Box(1)):
        assert instantiate(value) is value


def test_a_failing_call_names_its_target(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("detectron2").propagate = True
    with pytest.raises(TypeError, match="wrong"):
        instantiate(LazyCall(Box)(content=1, wrong=2))
    assert "Box" in caplog.text


def test_targets_must_define_a_callable() -> None:
    with pytest.raises(TypeError, match="callable"):
        LazyCall(3)  # type: ignore[arg-type]


def test_dataclasses_survive_yaml(tmp_path: Path) -> None:
    cfg = LazyCall(Box)(content=ShapeSpec(channels=3), label="x")
    LazyConfig.save(cfg, str(tmp_path / "saved.yaml"))
    for each in (cfg, LazyConfig.load(str(tmp_path / "saved.yaml"))):
        assert instantiate(each).content == ShapeSpec(channels=3)
    assert instantiate(LazyCall(ShapeSpec)(channels=4)) == ShapeSpec(channels=4)


def test_modules_are_built_from_configs() -> None:
    layer = instantiate(LazyCall(nn.Linear)(in_features=3, out_features="${.in_features}"))
    assert layer.weight.shape == (3, 3)


def test_load_rel_starts_at_the_file_of_the_caller(folder: Path) -> None:
    (folder / "rel.py").write_text(
        "from detectron2.config import LazyConfig\n"
        "train = LazyConfig.load_rel('parts/base.py', 'train')\n"
    )
    assert LazyConfig.load(str(folder / "rel.py")).train.seed == 1
