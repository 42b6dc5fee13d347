"""Every config loads, survives YAML, takes a number of classes, and builds its model.

What the docstrings of the configs say is tried out as well: commands, overrides, parameter counts.
"""

from __future__ import annotations

import ast
import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import ResNet
from detectron2.utils.registry import locate
from omegaconf import OmegaConf
from torch import nn

from efficient_detr.losses import BoxSizeForeground, SideDistanceForeground
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.encoder import CurrentValues, InitialValues
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.queries import ContrastiveDenoising
from efficient_detr.modeling.selection import LogitProductScore, ProbabilityProductScore
from efficient_detr.postprocessing import SoftmaxBestClass
from tests.building import without_storage

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.py"))
DILATED = "efficient_detr.modeling.backbones.dilated_resnet_stages"


@functools.cache
def loaded(name: str) -> Any:
    return LazyConfig.load(str(CONFIGS / name))


def load(name: str, *overrides: str) -> Any:
    """A copy of the config with overrides as on the command line."""
    return LazyConfig.apply_overrides(copy.deepcopy(loaded(name)), list(overrides))


def build(config: Any) -> EfficientDETR:
    """The model without storage for its weights."""
    model: EfficientDETR = without_storage(config.model)
    return model


def test_the_list_of_configs() -> None:
    families = {"detr", "deformable_detr", "sparse_detr", "smca_detr", "act_detr", "focus_detr"}
    assert {f"{name}.py" for name in families | {"dino", "quickstart"}} <= set(NAMES)


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((CONFIGS / name).read_text())) or ""


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_starts_with_a_command(name: str) -> None:
    commands = re.findall(r"python train_net\.py --config-file configs/(\S+)", docstring(name))
    assert name in commands
    assert set(commands) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_short(name: str) -> None:
    """Parts are written out in configs/common; the quickstart has data and schedule of its own."""
    lines = len((CONFIGS / name).read_text().splitlines())
    assert lines <= (110 if name == "quickstart.py" else 60)


def overrides_shown(name: str) -> list[str]:
    """All `key=value` of a docstring; the end of a sentence does not belong to the value."""
    found = re.findall(r"(?<![\w.])(?:\w+\.)+\w+=\S+", docstring(name))
    return [override.rstrip(".,;:`") for override in found]


SHOWN = [(name, override) for name in NAMES for override in overrides_shown(name)]


@pytest.mark.parametrize(("name", "override"), SHOWN)
def test_overrides_in_docstrings(name: str, override: str) -> None:
    """Each changes a key that exists, and the model can be built with it."""
    key, value = override.split("=", 1)
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(loaded(name), parent)
    exists = last in node.keys() if OmegaConf.is_dict(node) else int(last) < len(node)
    assert exists, f"{name} has no {key}"
    changed = load(name, override)
    assert plain(changed) != plain(loaded(name)), f"{key} is {value} already"
    if key.startswith("model."):
        build(changed)


def test_there_are_overrides_in_docstrings() -> None:
    assert len(SHOWN) > 20
    assert ("detr.py", "model.detector.backbone.stages.depth=101") in SHOWN


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_in_docstrings(name: str) -> None:
    """The number of parameters "here", in millions."""
    numbers = re.findall(r"\bHere (\d+\.\d+) M\b", " ".join(docstring(name).split()))
    for number in numbers:
        count = sum(parameter.numel() for parameter in build(load(name)).parameters())
        digits = len(number.partition(".")[2])
        assert number == f"{count / 1e6:.{digits}f}"


@pytest.mark.parametrize("name", NAMES)
def test_config(name: str, tmp_path: Path) -> None:
    """Through YAML and back, with seven classes, and built from what came back."""
    config = load(name, "model.num_classes=7")
    for key in OmegaConf.missing_keys(config):  # what a user must set, as the paths of own data
        OmegaConf.update(config, key, "given")
    assert config.keys() == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    path = tmp_path / "config.yaml"
    LazyConfig.save(config, str(path))
    reloaded = LazyConfig.load(str(path))
    assert plain(reloaded) == plain(config)
    model = build(reloaded)
    assert model.num_classes == 7
    # DETR's softmax has a class for "no object".
    outputs = 8 if isinstance(model.postprocessor, SoftmaxBestClass) else 7
    heads = modules_of(model, PredictionHead)
    assert {head.class_layer.out_features for head in heads} == {outputs}
    for denoising in modules_of(model, ContrastiveDenoising):
        assert denoising.num_classes == denoising.label_embedding.num_embeddings == 7


def plain(config: Any) -> Any:
    """Containers only; YAML knows no tuples and writes what is called as a name."""

    def convert(node: Any) -> Any:
        if isinstance(node, dict):
            target = node.get("_target_")
            known = {"_target_": locate(target)} if isinstance(target, str) else {}
            return {key: convert(value) for key, value in {**node, **known}.items()}
        return [convert(value) for value in node] if isinstance(node, (list, tuple)) else node

    return convert(OmegaConf.to_container(OmegaConf.create(config), resolve=False))


def modules_of(model: nn.Module, kind: type[Any]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", NAMES)
def test_schedule_ends_with_the_training(name: str) -> None:
    """The learning rate is at most the base rate and lowest at the end."""
    config = load(name)
    schedule = instantiate(config.lr_multiplier)
    multipliers = [schedule(step / 100) for step in range(100)]
    assert all(0 < value <= 1 for value in multipliers)
    assert multipliers[-1] <= 0.1 * max(multipliers) + 1e-9
    assert config.train.output_dir.startswith("output/"), "no two configs write to one place"


def test_every_config_has_its_own_output() -> None:
    folders = [load(name).train.output_dir for name in NAMES]
    assert len(set(folders)) == len(folders)


def test_five_scales() -> None:
    """The stride-4 map of the backbone and one extra level join."""
    model = build(load("dino_5scale.py"))
    assert model.detector.neck.in_features == ["res2", "res3", "res4", "res5"]
    assert model.detector.neck.num_levels == 5
    assert model.detector.tokenizer.level_embedding.shape == (5, 256)
    # 8 heads x 5 levels x 4 points x (x, y)
    layer: Any = model.detector.decoder.layers[0]
    assert layer.cross_attention.sampling_offsets.out_features == 8 * 5 * 4 * 2


def backbone_of(config: Any) -> Any:
    return without_storage(config.model.detector.backbone)


RESNETS = [
    name
    for name in NAMES
    if not name.startswith("quickstart")
    and loaded(name).model.detector.backbone["_target_"] is ResNet
]


@pytest.mark.parametrize("name", RESNETS)
def test_a_deeper_backbone_is_one_override(name: str) -> None:
    """ResNet-101 has 23 blocks in its fourth stage, dilated or not."""
    deeper = load(name, "model.detector.backbone.stages.depth=101")
    assert len(backbone_of(deeper).res4) == 23
    strides = [
        {key: shape.stride for key, shape in backbone_of(config).output_shape().items()}
        for config in (load(name), deeper)
    ]
    assert strides[0] == strides[1]


def test_a_dilated_backbone_is_one_override() -> None:
    config = load(
        "deformable_detr_single_scale.py", f"model.detector.backbone.stages._target_={DILATED}"
    )
    backbone = backbone_of(config)
    assert backbone.output_shape()["res5"].stride == 16
    assert backbone.res5[1].conv2.dilation == (2, 2)
    both = LazyConfig.apply_overrides(config, ["model.detector.backbone.stages.depth=101"])
    assert len(backbone_of(both).res4) == 23
    assert backbone_of(both).output_shape()["res5"].stride == 16


def test_dc5_is_detr_with_another_backbone() -> None:
    plain_detr, dilated = plain(load("detr.py")), plain(load("detr_dc5.py"))
    assert backbone_of(load("detr_dc5.py")).output_shape()["res5"].stride == 16
    for config in (plain_detr, dilated):
        del config["model"]["detector"]["backbone"], config["train"]["output_dir"]
    assert plain_detr == dilated


def test_detr_for_300_epochs() -> None:
    """The learning rate falls after 200 of 300 epochs; nothing else has to be set."""
    shown = [o for o in overrides_shown("detr.py") if o.startswith(("train.max", "lr_"))]
    config = load("detr.py", *shown)
    assert config.train.max_iter == 300 * 7500
    schedule = instantiate(config.lr_multiplier)
    assert [schedule(step / 300) for step in (0, 199.9, 200.1, 299.9)] == [1.0, 1.0, 0.1, 0.1]


def test_the_training_of_deformable_detr_is_half_as_many_batches_of_twice_the_size() -> None:
    config = load("deformable_detr.py")
    images = config.train.max_iter * config.dataloader.train.total_batch_size
    assert images == 50 * 7500 * 16


@pytest.mark.parametrize("name", ["dino_24ep.py", "focus_detr_24ep.py", "focus_detr_36ep.py"])
def test_longer_schedules_use_the_official_position_embedding(name: str) -> None:
    embedding = load(name).model.detector.tokenizer.position_embedding
    assert (embedding.temperature, embedding.offset) == (20, 0.0)
    short = load("focus_detr.py").model.detector.tokenizer.position_embedding
    assert (short.temperature, short.offset) == (10000, -0.5)


def test_what_the_paper_variant_changes() -> None:
    code, paper = load("focus_detr.py").model, load("focus_detr_paper.py").model
    parts = {
        ("score", code): (code.detector.encoder.object_score, LogitProductScore),
        ("score", paper): (paper.detector.encoder.object_score, ProbabilityProductScore),
        ("values", code): (code.detector.encoder.value_source, InitialValues),
        ("values", paper): (paper.detector.encoder.value_source, CurrentValues),
        ("labels", code): (code.losses[1].labels, SideDistanceForeground),
        ("labels", paper): (paper.losses[1].labels, BoxSizeForeground),
    }
    for node, expected in parts.values():
        assert type(instantiate(node)) is expected


def test_a_config_does_not_change_the_one_it_is_made_from() -> None:
    """Each load reads the files afresh: the paper's variant leaves no trace in its base."""
    before = plain(load("focus_detr.py"))
    load("focus_detr_paper.py")
    assert plain(LazyConfig.load(str(CONFIGS / "focus_detr.py"))) == before
