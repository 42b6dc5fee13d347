"""Learning rate and weight decay of each parameter of models with DAT or Swin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import Backbone, SwinTransformer
from omegaconf import OmegaConf
from torch import Tensor, nn

from efficient_detr.engine.optim import backbone_lr_factor, deformable_lr_factor
from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.dat_variants import StageSpecification, dat
from efficient_detr.modeling.backbones.parameter_groups import (
    blocks_to_output,
    layerwise_optimizer_params,
)

OPTIM = Path(__file__).parents[3] / "configs" / "common" / "optim.py"


def tiny_dat(**options: Any) -> Backbone:
    """Blocks 1; 2 and 3; 4; 5 and 6."""
    stages = [
        StageSpecification("L", 8, 2),
        StageSpecification("LS", 16, 2),
        StageSpecification("D", 32, 2),
        StageSpecification("LD", 64, 2),
    ]
    backbone: Backbone = instantiate(dat(stages, image_size=64, window=2, **options))
    return backbone


def tiny_swin() -> Backbone:
    """Blocks 1; 2 and 3; 4; 5."""
    swin: Backbone = SwinTransformer(
        pretrain_img_size=64,
        embed_dim=8,
        depths=[1, 2, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=2,
        drop_path_rate=0.0,  # the real one needs a further package for another rate
        ape=True,
        out_indices=(1, 2, 3),
    )
    return swin


class Pyramid(nn.Module):
    """As in Detectron2: the backbone of the model wraps the transformer."""

    def __init__(self, bottom_up: nn.Module) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(64, 4, 1)
        self.bottom_up = bottom_up


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.sampling_offsets = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(3, 4)
        self.scale = nn.Parameter(torch.ones(3))


def settings(model: nn.Module, **arguments: Any) -> dict[str, dict[str, float]]:
    """Learning rate and, where set, weight decay by name; every parameter is in one group."""
    groups = layerwise_optimizer_params(model, base_lr=1.0, **arguments)
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert parameter not in found
            found[parameter] = {key: group[key] for key in group if key != "params"}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(trained.values())
    return {name: found[parameter] for name, parameter in trained.items()}


DAT_DISTANCES = {
    "stages.0.merging.convolution.weight": 7,
    "stages.0.merging.norm.bias": 7,
    "stages.0.blocks.0.attention.projection.weight": 6,
    # What reduces a map belongs to the block before it.
    "stages.1.merging.convolution.weight": 6,
    "stages.1.blocks.0.attention_norm.weight": 5,
    "stages.1.blocks.1.attention.relative_position_bias_table": 4,
    "stages.2.merging.norm.weight": 4,
    "stages.2.blocks.0.attention.keys.offset_network.output.weight": 3,
    "stages.2.blocks.0.attention.position_bias.relative_position_bias_table": 3,
    "stages.3.merging.convolution.weight": 3,
    "stages.3.blocks.0.feedforward.expand.weight": 2,
    "stages.3.blocks.1.feedforward.contract.bias": 1,
    "output_norms.p1.weight": 0,
    "output_norms.p3.bias": 0,
}
SWIN_DISTANCES = {
    "absolute_pos_embed": 6,
    "patch_embed.proj.weight": 6,
    "patch_embed.norm.weight": 6,
    "layers.0.blocks.0.attn.qkv.weight": 5,
    "layers.0.downsample.reduction.weight": 5,
    "layers.1.blocks.0.mlp.fc1.weight": 4,
    "layers.1.blocks.1.attn.relative_position_bias_table": 3,
    "layers.1.downsample.norm.weight": 3,
    "layers.2.blocks.0.norm1.weight": 2,
    "layers.3.blocks.0.attn.proj.bias": 1,
    "norm1.weight": 0,
    "norm3.bias": 0,
}
backbones = pytest.mark.parametrize(
    ("make", "distances"), [(tiny_dat, DAT_DISTANCES), (tiny_swin, SWIN_DISTANCES)]
)


@backbones
@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up."])
def test_blocks_are_counted_from_the_output(make: Any, distances: Any, prefix: str) -> None:
    model = make()
    if "bottom_up" in prefix:
        model = Pyramid(model)
    if "backbone" in prefix:
        model = Detector(model)
    found = blocks_to_output(model)
    assert {name: found[prefix + name] for name in distances} == distances
    transformer = model.get_submodule(prefix.rstrip("."))
    assert set(found) == {prefix + name for name, _ in transformer.named_parameters()}


@backbones
def test_early_blocks_learn_slower(make: Any, distances: Any) -> None:
    """0.1 in the backbone, and 0.8 for each block."""
    found = settings(Detector(make()), lr_factor_func=backbone_lr_factor, lr_decay=0.8)
    for name, distance in distances.items():
        assert found[f"backbone.{name}"]["lr"] == pytest.approx(0.1 * 0.8**distance), name
    assert found["sampling_offsets.weight"]["lr"] == found["scale"]["lr"] == 1.0


def test_a_pyramid_around_the_backbone_learns_at_full_rate() -> None:
    found = settings(Detector(Pyramid(tiny_dat())), lr_decay=0.5)
    assert found["backbone.lateral.weight"]["lr"] == 1.0
    assert found["backbone.bottom_up.output_norms.p1.weight"]["lr"] == 1.0
    assert found["backbone.bottom_up.stages.0.merging.convolution.weight"]["lr"] == 0.5**7


def test_other_factors_stay() -> None:
    found = settings(Detector(tiny_dat()), lr_factor_func=deformable_lr_factor, lr_decay=0.5)
    assert found["sampling_offsets.weight"]["lr"] == 0.1
    assert found["embedding.weight"]["lr"] == 1.0


def test_without_decay_the_groups_are_few() -> None:
    """Two learning rates, each with and without weight decay."""
    groups = layerwise_optimizer_params(
        Detector(tiny_dat()), base_lr=1e-4, lr_factor_func=backbone_lr_factor
    )
    rates = sorted((group["lr"], group.get("weight_decay")) for group in groups if len(group) == 3)
    assert len(groups) == 4
    assert rates == [(pytest.approx(1e-5), 0.0), (pytest.approx(1e-4), 0.0)]


@backbones
def test_norms_biases_and_tables_do_not_decay(make: Any, distances: Any) -> None:
    found = settings(Detector(make()))
    model = Detector(make())
    for name, parameter in model.named_parameters():
        skipped = (
            parameter.dim() == 1
            or name.endswith(("bias", "absolute_pos_embed"))
            or "relative_position_bias_table" in name
        )
        assert ("weight_decay" in found[name]) == skipped, name
        assert found[name].get("weight_decay", 0.0) == 0.0
    assert "weight_decay" in found["scale"], "a factor of each channel is no matrix"
    assert "weight_decay" not in found["embedding.weight"]


def test_frozen_parameters_have_no_group() -> None:
    model = Detector(tiny_dat(freeze_at=3))
    found = settings(model)
    assert not any(name.startswith(("backbone.stages.0", "backbone.stages.1")) for name in found)
    assert any(name.startswith("backbone.stages.2") for name in found)


@pytest.mark.parametrize("lr_decay", [0.0, -0.5, 1.01])
def test_a_decay_out_of_range(lr_decay: float) -> None:
    with pytest.raises(ConfigError, match=f"lr_decay={lr_decay}: choose more than 0, at most 1"):
        layerwise_optimizer_params(tiny_dat(), base_lr=1.0, lr_decay=lr_decay)


class Convolutions(Backbone):
    """A backbone without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 4, 3)])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"p0": self.stages[0](images)}


def test_another_backbone_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"no backbone .* DAT and Swin.*configs/common/optim\.py"):
        layerwise_optimizer_params(Detector(Convolutions()), base_lr=1.0)


@pytest.mark.parametrize(
    ("name", "rate", "sampling"),
    [("layerwise_detr_adamw", 1e-4, 1e-4), ("layerwise_deformable_adamw", 2e-4, 2e-5)],
)
def test_the_optimizers_of_the_configs(
    name: str, rate: float, sampling: float, tmp_path: Path
) -> None:
    """Through YAML, with the model set as training does."""
    config = OmegaConf.create({"optimizer": LazyConfig.load(str(OPTIM), name)})
    LazyConfig.save(config, str(tmp_path / "config.yaml"))
    config = LazyConfig.load(str(tmp_path / "config.yaml"))
    model = Detector(tiny_dat())
    config.optimizer.params.lr_decay = 0.9
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    stem = model.get_parameter("backbone.stages.0.merging.convolution.weight")
    assert found[stem] == pytest.approx((0.1 * rate * 0.9**7, 1e-4))
    assert found[model.embedding.weight] == pytest.approx((rate, 1e-4))
    assert found[model.sampling_offsets.weight] == pytest.approx((sampling, 1e-4))
    assert found[model.norm.weight] == pytest.approx((rate, 0.0))
