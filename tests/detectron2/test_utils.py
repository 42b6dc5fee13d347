"""Names to objects, files, pickling, seeds and messages."""

import importlib
import inspect
import logging
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.transforms import RandomFlip
from detectron2.layers import ShapeSpec
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.colormap import colormap, random_color
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_every_n, log_first_n, setup_logger
from detectron2.utils.registry import Registry, _convert_target_to_string, locate
from detectron2.utils.serialize import PicklableWrapper


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.optim.SGD, "torch.optim.SGD"),
        (RandomFlip, "detectron2.data.transforms.RandomFlip"),
        (ShapeSpec, "detectron2.layers.ShapeSpec"),
        (len, "builtins.len"),
        (Path.home, "pathlib.Path.home"),
    ],
)
def test_names_are_short_and_lead_back(target: object, name: str) -> None:
    assert _convert_target_to_string(target) == name
    assert locate(name) == target


def test_long_names_lead_there_too() -> None:
    assert locate("torch.optim.sgd.SGD") is torch.optim.SGD
    assert locate("detectron2.layers.shape_spec.ShapeSpec") is ShapeSpec
    with pytest.raises(ImportError):
        locate("no_such_module.Thing")


def test_paths_on_disk_are_plain(tmp_path: Path) -> None:
    with PathManager.open(str(tmp_path / "a.txt"), "w") as file:
        file.write("text")
    assert PathManager.get_local_path(str(tmp_path / "a.txt")) == str(tmp_path / "a.txt")
    assert PathManager.exists(str(tmp_path / "a.txt"))


def test_closures_can_be_pickled() -> None:
    offset = 3
    wrapped = PicklableWrapper(PicklableWrapper(lambda x: x + offset))
    assert wrapped(1) == 4
    restored = pickle.loads(pickle.dumps(wrapped))
    assert restored(2) == 5


def test_a_seed_repeats_all_random_numbers() -> None:
    draws = []
    for seed in (3, 3, None):
        seed_all_rng(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1] != draws[2]


def _write(folder: Path, rank: int, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What the terminal and the file show of one message."""
    name = f"detectron2_test_{rank}"
    setup_logger(str(folder), rank, color=False, name=name)
    setup_logger(str(folder), rank, color=False, name=name)  # adds nothing
    logging.getLogger(f"{name}.part").warning("a message")
    suffix = f".rank{rank}" if rank else ""
    return capsys.readouterr().out, (folder / f"log.txt{suffix}").read_text()


def test_loggers_write_to_terminal_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = r"\[\d\d/\d\d \d\d:\d\d:\d\d\] detectron2_test_0\.part WARNING: a message\n"
    terminal, file = _write(tmp_path, 0, capsys)
    assert re.fullmatch(pattern, terminal)
    assert re.fullmatch(pattern, file)
    terminal, file = _write(tmp_path, 1, capsys)
    assert terminal == ""
    assert file.endswith("part WARNING: a message\n")


def test_registries() -> None:
    registry = Registry("PARTS")
    registry.register(ShapeSpec)
    assert registry.get("ShapeSpec") is ShapeSpec
    with pytest.raises(KeyError):
        registry.get("Missing")


def test_versions_are_reported() -> None:
    report = collect_env_info()
    for name in ("Python", "detectron2", "PyTorch", torch.__version__, np.__version__):
        assert name in report


def test_repeated_messages(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for number in range(7):
            log_first_n(logging.INFO, f"first {number}", n=2)
            log_every_n(logging.INFO, f"every {number}", n=3)
        for number in (1, 1, 2):
            log_first_n(logging.INFO, f"text {number}", key="message")
    messages = ["first 0", "every 0", "first 1", "every 3", "every 6", "text 1", "text 2"]
    assert [record.message for record in caplog.records] == messages
    assert {record.name for record in caplog.records} == {__name__}


def test_colours() -> None:
    colours = colormap(rgb=True, maximum=1)
    assert colours.shape == (74, 3)
    assert len(np.unique(colours, axis=0)) >= 70
    np.testing.assert_allclose(colormap(), colours[:, ::-1] * 255)
    np.random.seed(3)
    first = random_color(rgb=True)
    np.random.seed(3)
    np.testing.assert_array_equal(random_color(), first[::-1])
    assert (np.abs(colormap(rgb=True) - first).sum(axis=1) == 0).any()


MODULES = """
checkpoint.detection_checkpoint config.instantiate config.lazy data.build data.catalog data.common
data.dataset_mapper data.datasets.builtin data.datasets.builtin_meta data.datasets.coco
data.detection_utils data.samplers.distributed_sampler data.transforms.augmentation
data.transforms.augmentation_impl data.transforms.transform engine.defaults engine.hooks
engine.launch engine.train_loop evaluation.coco_evaluation evaluation.evaluator
evaluation.testing layers.batch_norm layers.blocks layers.shape_spec layers.wrappers
modeling.backbone.backbone modeling.backbone.build modeling.backbone.resnet modeling.meta_arch
modeling.postprocessing solver.build solver.lr_scheduler structures.boxes structures.image_list
structures.instances utils.colormap
"""
PLACES = [
    ("checkpoint.detection_checkpoint", "DetectionCheckpointer"),
    ("config.instantiate", "instantiate"),
    ("config", "instantiate"),
    ("data.common", "MapDataset"),
    ("data.samplers.distributed_sampler", "TrainingSampler"),
    ("data.transforms.augmentation", "AugmentationList"),
    ("data.transforms.transform", "ResizeTransform"),
    ("engine.launch", "launch"),
    ("engine", "launch"),
    ("layers.batch_norm", "get_norm"),
    ("layers.wrappers", "Conv2d"),
    ("modeling.backbone.backbone", "Backbone"),
    ("modeling.backbone.build", "BACKBONE_REGISTRY"),
    ("modeling.meta_arch", "META_ARCH_REGISTRY"),
    ("solver.lr_scheduler", "LRMultiplier"),
]


@pytest.mark.parametrize("name", MODULES.split())
def test_modules_that_scripts_import(name: str) -> None:
    module = importlib.import_module(f"detectron2.{name}")
    assert any(not key.startswith("__") for key in vars(module))


@pytest.mark.parametrize(("module", "name"), PLACES)
def test_names_are_where_configs_and_pickles_look(module: str, name: str) -> None:
    found = getattr(importlib.import_module(f"detectron2.{module}"), name)
    package = importlib.import_module("detectron2." + module.rsplit(".", 1)[0])
    assert not inspect.ismodule(found)
    assert getattr(package, name, found) is found
