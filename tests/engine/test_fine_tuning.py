"""Training that starts from other people's detectors, and from ours, on another data set."""

import json
import logging
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from torch import Tensor

from efficient_detr.checkpoint.classes import coco_id_names
from efficient_detr.checkpoint.convert import export_checkpoint
from efficient_detr.engine.checkpointer import AtomicCheckpointer
from efficient_detr.engine.checks import load_config
from efficient_detr.engine.predictor import Predictor
from efficient_detr.engine.train import run
from efficient_detr.errors import UserError
from tests.engine.tiny import tiny_resnet, write_project
from tests.tiny_models import tiny_config, with_noise

DINO = 'tiny_config("dino", num_classes=3, num_queries=9, backbone=tiny_resnet())'
CLASS_BIAS = "detector.decoder.heads.0.class_layer.bias"
CLASS_WEIGHT = "detector.decoder.heads.1.class_layer.weight"
QUERIES = "detector.queries.content"

State = dict[str, Tensor]


def final(config_file: str) -> Path:
    return Path(config_file).parent / "output" / "model_final.pth"


def named_project(folder: Path, names: list[str], model: str = DINO) -> str:
    """A project whose data set gives its classes these names; returns the config's path."""
    # Data sets are named after the folder, and the catalog of Detectron2 is global.
    folder = folder / f"{folder.parent.name}_{folder.name}"
    folder.mkdir(parents=True)
    config_file = write_project(folder, model=model)
    for split in ("train", "val"):
        path = folder / f"{split}.json"
        content = json.loads(path.read_text())
        for category, name in zip(content["categories"], names, strict=True):
            category["name"] = name
        path.write_text(json.dumps(content))
    return config_file


def start(config_file: str, checkpoint: Path, *overrides: str, eval_only: bool = False) -> Any:
    """Starts from a checkpoint and trains one step of no length."""
    overrides = (
        f"train.init_checkpoint='{checkpoint}'",
        "train.max_iter=1",
        "optimizer.lr=0.0",
        "dataloader.evaluator=null",
        *overrides,
    )
    args = Namespace(config_file=config_file, resume=False, eval_only=eval_only, opts=overrides)
    return run(load_config(config_file, overrides), args)


def trained(config_file: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(final(config_file), weights_only=True)
    return content


@pytest.fixture(scope="module")
def source() -> State:
    """A DINO with a row for each of COCO's category numbers."""
    torch.manual_seed(0)
    config = tiny_config("dino", num_classes=91, backbone=tiny_resnet())
    state: State = with_noise(instantiate(config)).state_dict()
    return state


@pytest.fixture(scope="module")
def published(source: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the authors' code saves it."""
    path = tmp_path_factory.mktemp("published") / "checkpoint0011.pth"
    args = Namespace(lr=1e-4, backbone="resnet50", output_dir=Path("logs"))
    model = export_checkpoint(source, "dino")
    torch.save({"model": model, "ema_model": {}, "epoch": 11, "args": args}, path)
    return path


def test_a_published_detector_on_own_classes(
    tmp_path: Path, source: State, published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config_file = named_project(tmp_path / "own", ["dog", "cell", "person"])
    with caplog.at_level(logging.INFO, logger="efficient_detr"):
        start(config_file, published)
    (table,) = [r for r in caplog.records if str(published) in r.message and "loaded" in r.message]
    assert table.levelno == logging.INFO
    content = trained(config_file)
    tuned = content["model"]
    assert content["class_names"] == ["dog", "cell", "person"]

    changed = {name for name, value in tuned.items() if not same(value, source[name])}
    assert all("class_layer" in n or "label_embedding" in n or n == QUERIES for n in changed)
    assert {CLASS_BIAS, CLASS_WEIGHT, QUERIES} <= changed
    ids = coco_id_names()
    for name in (CLASS_BIAS, CLASS_WEIGHT):
        dog, cell, person = tuned[name]
        assert torch.equal(dog, source[name][ids.index("dog")])
        assert torch.equal(person, source[name][ids.index("person")])
        assert not any(torch.equal(cell, row) for row in source[name])
    assert tuned[QUERIES].shape[0] == 9 and source[QUERIES].shape[0] == 12


def same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def test_our_own_detector_on_other_classes(tmp_path: Path, published: Path) -> None:
    first = named_project(tmp_path / "first", ["cat", "dog", "cow"])
    start(first, published)
    before = trained(first)["model"]
    second = named_project(tmp_path / "second", ["cow", "hen", "cat"])
    start(second, final(first))
    after = trained(second)["model"]
    for name in (CLASS_BIAS, CLASS_WEIGHT):
        cat, dog, cow = before[name]
        assert torch.equal(after[name][0], cow)
        assert torch.equal(after[name][2], cat)
        assert not any(torch.equal(after[name][1], row) for row in (cat, dog, cow))
    assert torch.equal(after[QUERIES], before[QUERIES])


def test_the_same_classes_and_queries_change_nothing(
    tmp_path: Path, published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config_file = named_project(tmp_path / "own", ["a", "b", "c"])
    start(config_file, published)
    before = trained(config_file)["model"]
    overrides = (f"train.output_dir={tmp_path}/again", "train.seed=5")
    with caplog.at_level(logging.INFO, logger="efficient_detr"):
        caplog.clear()
        start(config_file, final(config_file), *overrides)
    after = torch.load(tmp_path / "again/model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "loaded into" not in caplog.text

    # Without the data set, the file still tells what its classes are called.
    overrides = (
        f"train.init_checkpoint='{final(config_file)}'",
        "dataloader.test.dataset.names=null",
        "dataloader.test.dataset.json_file=null",
    )
    assert Predictor(load_config(config_file, overrides)).metadata.thing_classes == ["a", "b", "c"]
    caplog.clear()
    other = named_project(tmp_path / "other", ["a", "b", "d"])
    start(other, final(config_file), eval_only=True)
    assert "was trained on other classes: it knows no d" in caplog.text


def test_evaluation_wants_all_classes(tmp_path: Path, published: Path) -> None:
    model = DINO.replace("num_queries=9", "num_queries=12")
    config_file = named_project(tmp_path / "own", ["dog", "cell", "person"], model)
    for evaluate in (
        lambda: start(config_file, published, eval_only=True),
        lambda: Predictor(
            load_config(config_file, [f"train.init_checkpoint='{published}'"]), config_file
        ),
    ):
        with pytest.raises(UserError, match="other classes .*fine-tune") as error:
            evaluate()
        text = str(error.value)
        assert "\n" not in text and "num_classes" not in text
        for name in (str(published), "DINO", config_file):
            assert name in text


def test_the_detector_of_another_family(tmp_path: Path, published: Path) -> None:
    model = 'tiny_config("focus_detr", num_classes=3, backbone=tiny_resnet())'
    config_file = named_project(tmp_path / "focus", ["dog", "cell", "person"], model)
    with pytest.raises(UserError) as error:
        start(config_file, published)
    text = str(error.value)
    assert "\n" not in text
    for name in (str(published), "DINO", f"the config {config_file}"):
        assert name in text
    assert not final(config_file).exists()


def test_a_part_of_another_family_if_allowed(
    tmp_path: Path, source: State, published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = 'tiny_config("focus_detr", num_classes=3, backbone=tiny_resnet())'
    config_file = named_project(tmp_path / "focus", ["dog", "cell", "person"], model)
    with caplog.at_level(logging.WARNING, logger="efficient_detr"):
        start(config_file, published, "+train.allow_partial_checkpoint=True")
    tuned = trained(config_file)["model"]
    name = "detector.encoder.layers.0.feedforward.linear1.weight"
    name = name if name in tuned else next(n for n in tuned if "encoder.layers.0" in n)
    assert torch.equal(tuned[name], source[name])
    assert "left at their initial values" in caplog.text


@pytest.mark.parametrize("ending", ["pth", "pkl"])
def test_the_backbone_of_a_classifier(
    tmp_path: Path, source: State, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As torchvision names a ResNet, and as in the model zoo of Detectron2."""
    path = tmp_path / f"resnet.{ending}"
    prefix = "detector.backbone."
    if ending == "pkl":
        ours = {name.removeprefix(prefix): v for name, v in source.items() if prefix in name}
        content = {"model": {name: value.numpy() for name, value in ours.items()}}
        content |= {"__author__": "torchvision", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content))
    else:
        body = "backbone.0.body."
        theirs = export_checkpoint(source, "dino")
        torch.save({k.removeprefix(body): v for k, v in theirs.items() if body in k}, path)
    config_file = named_project(tmp_path / "own", ["dog", "cell", "person"])
    for eval_only in (False, True):
        with caplog.at_level(logging.INFO, logger="efficient_detr"):
            caplog.clear()
            start(config_file, path, eval_only=eval_only)
        (record,) = [r for r in caplog.records if "loaded into detector.backbone" in r.message]
        assert record.levelno == (logging.WARNING if eval_only else logging.INFO)
    tuned = trained(config_file)["model"]
    for name, value in source.items():
        assert torch.equal(tuned[name], value) if name.startswith(prefix) else name in tuned


@pytest.mark.parametrize("fault", ["shape", "missing", "unexpected"])
def test_nothing_is_loaded_of_a_file_with_one_fault(
    tmp_path: Path, source: State, fault: str
) -> None:
    state = export_checkpoint(source, "dino")
    key = "transformer.decoder.layers.1.linear2.weight"
    if fault == "shape":
        state[key] = torch.zeros(5, 5)
    elif fault == "missing":
        del state[key]
    else:
        state["transformer.decoder.layers.1.linear3.weight"] = torch.zeros(1)
    path = tmp_path / "faulty.pth"
    torch.save({"model": state}, path)
    model = instantiate(tiny_config("dino", num_classes=91, backbone=tiny_resnet()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"faulty\.pth \(DINO.* does not fit the config x\.py"):
        AtomicCheckpointer(model, model_name="the config x.py").load(str(path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
