"""Formats of detrex, by lists of keys and shapes.

The lists were taken from detrex's models (commit e244e6c), built from their own configs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from torch import Tensor, nn

from efficient_detr.checkpoint.conversion import Row, convert_keys, read_keys, write_keys
from efficient_detr.checkpoint.formats import find_format
from tests.building import without_storage
from tests.checkpoint.manifest_files import check_format, load_manifest, meta_state

CONFIGS = Path(__file__).parents[2] / "configs"

# Manifest: (format, config).
PUBLISHED = {
    "detrex_dino_r50_4scale": ("detrex_dino", "dino"),
    "detrex_focus_detr_r50_4scale": ("detrex_dino", "focus_detr"),
    "detrex_detr_r50": ("detrex_detr", "detr"),
    "detrex_detr_r50_dc5": ("detrex_detr_dc5", "detr_dc5"),
    "detrex_deformable_detr_r50": ("detrex_deformable_detr", "deformable_detr"),
    "detrex_deformable_detr_r50_refine": ("detrex_deformable_detr", "deformable_detr_refine"),
    "detrex_deformable_detr_r50_two_stage": ("detrex_deformable_detr", "deformable_detr_two_stage"),
}
published = pytest.mark.parametrize("name", PUBLISHED)

# The loss weighs "no object" by a tenth.
CLASS_WEIGHTS = torch.ones(81)
CLASS_WEIGHTS[80] = 0.1


def build(config: str) -> nn.Module:
    """A shipped model, for 80 classes, without storage."""
    model: nn.Module = without_storage(LazyConfig.load(str(CONFIGS / f"{config}.py")).model)
    return model


@published
def test_a_published_layout_is_read_and_written(name: str) -> None:
    layout, config = PUBLISHED[name]
    given = {"criterion.empty_weight": CLASS_WEIGHTS} if "detrex_detr" in name else None
    check_format(name, layout, lambda: build(config), given)


def table_of(name: str) -> list[Row]:
    return find_format(PUBLISHED[name][0]).read_table(load_manifest(name).shapes)


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        # A head has 2 + 6 tensors: a linear layer and a perceptron of three. One of six is kept.
        ("detrex_deformable_detr_r50", 5 * 8),
        # Six box heads once more below the decoder.
        ("detrex_deformable_detr_r50_refine", 6 * 6),
        # Seven heads once more below the decoder, the last of which is that of the proposals.
        ("detrex_deformable_detr_r50_two_stage", 7 * 8),
        ("detrex_dino_r50_4scale", 7 * 8),
        # Six encoder layers share the class head of the proposals, under two names.
        ("detrex_focus_detr_r50_4scale", 7 * 8 + 2 * 6 * 2),
    ],
)
def test_copies_are_dropped(name: str, copies: int) -> None:
    found = read_keys(meta_state(load_manifest(name)), table_of(name))
    assert list(found.dropped.values()) == ["copies of other weights"] * copies


def test_the_head_after_the_last_layer_is_that_of_the_proposals() -> None:
    """Here there are three decoder layers."""
    state = {
        key: tensor
        for key, tensor in meta_state(load_manifest("detrex_dino_r50_4scale")).items()
        if not re.search(r"decoder\.layers\.[345]|_embed\.[456]\.", key)
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    found = read_keys(state, find_format("detrex_dino").read_table(shapes))
    heads = {found.sources[name][0]: name for name in found.sources if name.endswith("layer.bias")}
    assert heads == {
        "class_embed.0.bias": "detector.decoder.heads.0.class_layer.bias",
        "class_embed.1.bias": "detector.decoder.heads.1.class_layer.bias",
        "class_embed.2.bias": "detector.decoder.heads.2.class_layer.bias",
        "class_embed.3.bias": "detector.proposals.head.class_layer.bias",
    }


@pytest.mark.parametrize(
    ("name", "number", "objects"),
    [("detrex_dino_r50_4scale", 0, False), ("detrex_focus_detr_r50_4scale", 1, True)],
)
def test_deformable_attention_comes_after_that_of_objects(
    name: str, number: int, objects: bool
) -> None:
    layer, ours = "transformer.encoder.layers.2.", "detector.encoder.layers.2."
    found = read_keys(meta_state(load_manifest(name)), table_of(name))
    theirs = f"{layer}attentions.{number}.value_proj.bias"
    assert found.sources[f"{ours}attention.value_projection.bias"] == (theirs,)
    assert (f"{ours}object_attention.norm.bias" in found.state) == objects
    if objects:
        assert found.sources[f"{ours}object_attention.norm.bias"] == (f"{layer}norm2.bias",)
        attention = f"{ours}object_attention.attention.in_proj_bias"
        assert found.sources[attention] == (f"{layer}attentions.0.attn.in_proj_bias",)


@published
def test_norms_are_in_the_order_of_execution(name: str) -> None:
    layer, ours = "transformer.decoder.layers.4.", "detector.decoder.layers.4."
    found = read_keys(meta_state(load_manifest(name)), table_of(name))
    for number, norm in enumerate(("self_attention", "cross_attention", "feedforward")):
        assert found.sources[f"{ours}{norm}_norm.bias"] == (f"{layer}norms.{number}.bias",)


@pytest.mark.parametrize("classes", [1, 80])
def test_the_weights_of_classes_in_the_loss_are_written_again(classes: int) -> None:
    state: dict[str, Tensor] = {
        "detector.decoder.heads.0.class_layer.weight": torch.rand(classes + 1, 4),
        "detector.decoder.heads.0.class_layer.bias": torch.rand(classes + 1),
    }
    written = write_keys(state, find_format("detrex_detr").write_table({}))
    expected = torch.tensor([1.0] * classes + [0.1])
    assert torch.equal(written["criterion.empty_weight"], expected)


@published
@pytest.mark.parametrize(
    "key",
    [
        "model.backbone.stem.conv1.weight",  # a prefix in front
        "transformer.encoder.layers.0.attentions.2.value_proj.weight",
        "transformer.decoder.layers.0.norms.3.weight",
        "",
    ],
)
def test_unknown_keys_are_named(name: str, key: str) -> None:
    with pytest.raises(KeyError, match=re.escape(f"no rule for checkpoint key {key}: ")):
        convert_keys({key: torch.zeros(1)}, table_of(name))
