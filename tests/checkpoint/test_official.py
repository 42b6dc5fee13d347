"""Layouts of the official repositories -> ours, by lists of keys and shapes.

The lists were taken from the authors' models at full size, for 91 classes and without backbones.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from torch import Tensor, nn

from efficient_detr.checkpoint import KeyRule, convert_keys, official

MANIFESTS = Path(__file__).parent / "manifests"
CONFIGS = Path(__file__).parents[2] / "configs"

SIZES = dict(num_maps=3, num_levels=4)
LAYOUTS: dict[str, list[KeyRule]] = {
    "detr": official.detr(),
    "deformable_detr_single_scale": official.deformable_detr(num_maps=1, num_levels=1),
    "deformable_detr": official.deformable_detr(**SIZES),
    "deformable_detr_refine": official.deformable_detr_refine(**SIZES, decoder_layers=6),
    "deformable_detr_two_stage": official.deformable_detr_refine(**SIZES, decoder_layers=6),
    "sparse_detr": official.sparse_detr(**SIZES, encoder_layers=6, decoder_layers=6),
}
layouts = pytest.mark.parametrize("name", LAYOUTS)


def official_state(name: str) -> dict[str, Tensor]:
    """A state dict without storage."""
    shapes = json.loads((MANIFESTS / f"official_{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def our_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of everything but the backbone."""
    config.detector.backbone = nn.Identity()
    with torch.device("meta"):
        model = instantiate(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@layouts
def test_official_weights_fill_the_model(name: str) -> None:
    """Every key finds its place, every parameter and buffer of ours its tensor of equal shape."""
    config = LazyConfig.load(str(CONFIGS / f"{name}.py")).model
    config.num_classes = 91
    converted = convert_keys(official_state(name), LAYOUTS[name])
    assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == our_shapes(config)


@pytest.mark.parametrize(
    ("name", "duplicates"),
    [
        ("detr", 0),
        # A head has 2 + 6 tensors: a linear layer and a perceptron of three. One of six copies is
        # kept.
        ("deformable_detr", 5 * 8),
        # Six box heads once more below the decoder.
        ("deformable_detr_refine", 6 * 6),
        # Seven heads once more below the decoder, the last of which is that of the proposals.
        ("deformable_detr_two_stage", 7 * 8),
        # Twelve heads once more below the decoder, five of them also below the encoder.
        ("sparse_detr", 12 * 8 + 5 * 8),
    ],
)
def test_duplicates_are_dropped(name: str, duplicates: int) -> None:
    state = official_state(name)
    assert len(state) - len(convert_keys(state, LAYOUTS[name])) == duplicates


def test_pre_norm_weights_fill_the_model() -> None:
    """The pre-norm model has the keys of the other one and a norm after the encoder."""
    load = LazyConfig.load(str(CONFIGS / "common" / "models" / "detr.py"), ("detr", "pre_norm"))
    detr, pre_norm = load
    state = official_state("detr")
    for kind in ("weight", "bias"):
        state[f"transformer.encoder.norm.{kind}"] = torch.empty(256, device="meta")
    converted = convert_keys(state, official.detr())
    shapes = {key: tuple(tensor.shape) for key, tensor in converted.items()}
    assert shapes == our_shapes(pre_norm(detr(num_classes=91)))


@pytest.mark.parametrize(
    ("rules", "self_attention", "cross_attention"),
    [(official.detr(), 1, 2), (official.deformable_detr(num_maps=3, num_levels=4), 2, 1)],
    ids=["detr", "deformable_detr"],
)
def test_norms_in_the_order_of_execution(
    rules: list[KeyRule], self_attention: int, cross_attention: int
) -> None:
    """Deformable DETR normalises self-attention with `norm2`, cross-attention with `norm1`."""
    numbers = {"self_attention_norm": self_attention, "cross_attention_norm": cross_attention}
    for ours, number in (numbers | {"feedforward_norm": 3}).items():
        tensor = torch.zeros(4)
        state = {f"transformer.decoder.layers.5.norm{number}.bias": tensor}
        assert list(convert_keys(state, rules)) == [f"detector.decoder.layers.5.{ours}.bias"]


def test_numbers_of_heads() -> None:
    """Three decoder layers: heads 0 to 2; then the proposals', then those of encoder layers."""
    rules = official.sparse_detr(num_maps=3, num_levels=4, encoder_layers=4, decoder_layers=3)
    state = {f"bbox_embed.{number}.layers.1.bias": torch.zeros(4) for number in range(7)}
    assert [re.sub(r"\.box_layers.*", "", key) for key in convert_keys(state, rules)] == [
        "detector.decoder.heads.0",
        "detector.decoder.heads.1",
        "detector.decoder.heads.2",
        "detector.proposals.head",
        "detector.encoder_heads.heads.0",
        "detector.encoder_heads.heads.1",
        "detector.encoder_heads.heads.2",
    ]


def test_input_projections_beyond_the_backbone() -> None:
    """Two backbone maps and five levels: the levels from number 2 on are extra ones."""
    rules = official.deformable_detr(num_maps=2, num_levels=5)
    state = {f"input_proj.{level}.{part}.bias": torch.zeros(4) for level in (1, 4) for part in "01"}
    assert list(convert_keys(state, rules)) == [
        "detector.neck.convs.1.bias",
        "detector.neck.convs.1.norm.bias",
        "detector.neck.extra_convs.2.bias",
        "detector.neck.extra_convs.2.norm.bias",
    ]


@layouts
@pytest.mark.parametrize(
    "key", ["transformer.encoder.layers.0.norm4.weight", "norm.weight", "epoch", ""]
)
def test_unknown_keys_are_named(name: str, key: str) -> None:
    with pytest.raises(KeyError, match=re.escape(f"no rule for checkpoint key {key}")):
        convert_keys({key: torch.zeros(1)}, LAYOUTS[name])
