"""Every config loads, survives YAML, takes a number of classes, and builds its model."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.registry import locate
from omegaconf import OmegaConf
from torch import nn

from efficient_detr.losses import BoxSizeForeground, SideDistanceForeground
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.encoder import CurrentValues, InitialValues
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.queries import ContrastiveDenoising
from efficient_detr.modeling.selection import LogitProductScore, ProbabilityProductScore

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.py"))


@functools.cache
def loaded(name: str) -> Any:
    return LazyConfig.load(str(CONFIGS / name))


def load(name: str, *overrides: str) -> Any:
    """A copy of the config with overrides as on the command line."""
    return LazyConfig.apply_overrides(copy.deepcopy(loaded(name)), list(overrides))


def build(config: Any) -> EfficientDETR:
    """The model without storage for its weights."""
    with torch.device("meta"):
        model: EfficientDETR = instantiate(config.model)
    return model


def test_the_list_of_configs() -> None:
    assert {"dino.py", "focus_detr.py", "focus_detr_paper.py", "quickstart.py"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config(name: str, tmp_path: Path) -> None:
    """Through YAML and back, with seven classes, and built from what came back."""
    config = load(name, "model.num_classes=7")
    for key in OmegaConf.missing_keys(config):  # what a user must set, as the paths of own data
        OmegaConf.update(config, key, "given")
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= config.keys()
    path = tmp_path / "config.yaml"
    LazyConfig.save(config, str(path))
    reloaded = LazyConfig.load(str(path))
    assert plain(reloaded) == plain(config)
    model = build(reloaded)
    assert model.num_classes == 7
    heads = modules_of(model, PredictionHead)
    assert len(heads) == len(config.model.detector.decoder.layers) + 1
    assert {head.class_layer.out_features for head in heads} == {7}
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


def test_a_deeper_backbone_is_one_override() -> None:
    """ResNet-101 has 23 blocks in its fourth stage."""
    config = load("focus_detr.py", "model.detector.backbone.stages.depth=101")
    with torch.device("meta"):
        backbone = instantiate(config.model.detector.backbone)
    assert len(backbone.res4) == 23


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
