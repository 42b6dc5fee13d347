"""Published key layouts -> ours, by lists of keys and shapes.

The lists were taken from detrex's models (commit e244e6c), built from their own configs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from torch import Tensor

from efficient_detr.checkpoint import KeyRule, convert_keys, detrex
from efficient_detr.checkpoint.conversion import rename_keys

MANIFESTS = Path(__file__).parent / "manifests"
CONFIGS = Path(__file__).parents[2] / "configs"

layouts = pytest.mark.parametrize(
    ("manifest", "config"),
    [
        ("detrex_dino_r50_4scale", "dino.py"),
        ("detrex_focus_detr_r50_4scale", "focus_detr.py"),
    ],
)


def published_state(manifest: str) -> dict[str, Tensor]:
    """A state dict without storage."""
    shapes: dict[str, list[int]] = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@layouts
def test_published_weights_fill_the_model(manifest: str, config: str) -> None:
    """Every key finds its place, every parameter and buffer of ours its tensor of equal shape."""
    converted = convert_keys(published_state(manifest), detrex(decoder_layers=6))
    with torch.device("meta"):
        model = instantiate(LazyConfig.load(str(CONFIGS / config)).model)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == ours
    assert model.load_state_dict(converted, strict=True, assign=True).missing_keys == []


@layouts
def test_duplicates_are_dropped(manifest: str, config: str) -> None:
    """The decoder's heads are stored twice; Focus-DETR stores its class head 13 times more.

    Seven heads: a linear layer (2 tensors) and a perceptron of three (6 tensors). Focus-DETR's six
    encoder layers share one class head (2 tensors), under two names.
    """
    state = published_state(manifest)
    converted = convert_keys(state, detrex(decoder_layers=6))
    expected = 7 * (2 + 6) + (2 * 6 * 2 if "focus" in manifest else 0)
    assert len(state) - len(converted) == expected


def test_tensors_are_handed_on_as_they_are() -> None:
    tensor = torch.randn(256)
    converted = convert_keys({"transformer.enc_output.bias": tensor}, detrex(6))
    assert converted == {"detector.proposals.projection.bias": tensor}


def test_the_head_after_the_last_layer_is_that_of_the_proposals() -> None:
    state = {f"class_embed.{i}.bias": torch.zeros(1) for i in range(4)}
    assert list(convert_keys(state, detrex(decoder_layers=3))) == [
        "detector.decoder.heads.0.class_layer.bias",
        "detector.decoder.heads.1.class_layer.bias",
        "detector.decoder.heads.2.class_layer.bias",
        "detector.proposals.head.class_layer.bias",
    ]


@pytest.mark.parametrize(
    "key",
    [
        "model.backbone.stem.conv1.weight",  # a prefix in front
        "transformer.encoder.layers.0.attentions.2.value_proj.weight",
        "criterion.empty_weight",
        "",
    ],
)
def test_unknown_keys_are_named(key: str) -> None:
    with pytest.raises(KeyError, match="no rule for checkpoint key " + key) as caught:
        convert_keys({key: torch.zeros(1)}, detrex(6))
    assert "is this the right format?" in str(caught.value)


def test_the_first_rule_that_matches_decides() -> None:
    rules = [KeyRule(r"a\.b\.", "first."), KeyRule(r"a\.", "second."), KeyRule(r"c\.", None)]
    state = {name: torch.zeros(1) for name in ("a.b.x", "a.c.x", "c.x")}
    assert list(convert_keys(state, rules)) == ["first.x", "second.c.x"]


def test_patterns_are_anchored_at_the_start() -> None:
    state = {"inner.a.x": torch.zeros(1)}
    with pytest.raises(KeyError, match="no rule for checkpoint key inner.a.x"):
        convert_keys(state, [KeyRule(r"a\.", "b.")])
    # Only the start is replaced, even where the pattern occurs again.
    assert list(convert_keys({"a.a.x": torch.zeros(1)}, [KeyRule(r"a\.", "b.")])) == ["b.a.x"]


def test_two_keys_of_one_name() -> None:
    rules = [KeyRule(r"[ab]\.", "c.")]
    with pytest.raises(KeyError, match=r"checkpoint key b\.x and another both become c\.x"):
        convert_keys({"a.x": torch.zeros(1), "b.x": torch.zeros(1)}, rules)


def test_dropped_keys_have_reasons() -> None:
    rules = [KeyRule("a", None, "constants"), KeyRule("b", None), KeyRule("", "ours.")]
    renamed = rename_keys({key: torch.zeros(1) for key in ("a.x", "b", "c")}, rules)
    assert renamed.dropped == {"a.x": "constants", "b": "copies of other weights"}
    assert renamed.names == {"ours.c": "c"}


def test_names_of_the_model_decide_between_rules() -> None:
    """One key can stand for different parts; without a model the first rule has it."""
    rules = [KeyRule(r"table$", "relative"), KeyRule(r"table$", "fixed")]
    for known, name in (
        ((), "relative"),
        (("fixed",), "fixed"),
        (("relative", "fixed"), "relative"),
    ):
        assert rename_keys({"table": torch.zeros(1)}, rules, known).names == {name: "table"}


def test_rules_below_a_module() -> None:
    outer = r"stages\.(\d+)\.attns\.(\d+)\.", r"stages.\1.blocks.\2.attention."
    rules = [
        KeyRule(r"(?:proj_)?qkv\.", "projection.").below(*outer),
        KeyRule("index", None, "constants").below(*outer),
    ]
    keys = ("stages.2.attns.11.qkv.bias", "stages.2.attns.3.index")
    renamed = rename_keys({key: torch.zeros(1) for key in keys}, rules)
    assert renamed.names == {"stages.2.blocks.11.attention.projection.bias": keys[0]}
    assert renamed.dropped == {keys[1]: "constants"}
