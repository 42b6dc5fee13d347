"""The reader of fixtures on sizes and options that the stored fixtures do not have.

A model of random weights is run and what happens is written down in the layout of the official
numbers; then the reader must build the model again from the fixture alone, and find every number.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.golden_families import compare, sparse_detr
from tests.golden_families.fixture import Comparison, Fixture, recipe_weights
from tests.golden_families.writer import (
    DEFORMABLE,
    DETR,
    SMCA,
    SMCA_MULTI_SCALE,
    SPARSE,
    start_sparse,
    write,
)

THREE_IMAGES: dict[str, Any] = dict(
    sizes=[(120, 96), (128, 128), (90, 100)], boxes=[2, 0, 4], strides=[8, 16, 32]
)
ONE_MAP: dict[str, Any] = THREE_IMAGES | {"strides": [16]}
TWO_MAPS: dict[str, Any] = THREE_IMAGES | {"strides": [16, 32]}

PLAIN = {"two_stage": False, "with_box_refine": False}
PUBLISHED_SPARSE = {"num_queries": 9, "enc_layers": 3, "rho": 0.1}
NOT_EFFICIENT = {
    "eff_query_init": False,
    "eff_specific_head": False,
    "use_enc_aux_loss": False,
}

SETTINGS = {
    "detr": (DETR, {"enc_layers": 1, "dec_layers": 3, "nhead": 2}, ONE_MAP),
    "detr_pre_norm": (DETR, {"pre_norm": True, "num_queries": 7}, ONE_MAP),
    "deformable": (DEFORMABLE, PLAIN | {"enc_n_points": 3, "dec_n_points": 2}, THREE_IMAGES),
    "refine_5_levels": (
        DEFORMABLE,
        {"two_stage": False, "num_feature_levels": 5, "dec_layers": 2},
        THREE_IMAGES,
    ),
    "two_stage_2_maps": (
        DEFORMABLE,
        {"backbone_channels": [10, 14], "num_feature_levels": 3, "num_classes": 4},
        TWO_MAPS,
    ),
    "two_stage_recipe": (
        DEFORMABLE,
        {"d_model": 64, "nhead": 8, "enc_layers": 1},
        THREE_IMAGES | {"recipe": True},
    ),
    "sparse": (SPARSE, PUBLISHED_SPARSE, THREE_IMAGES),
    "sparse_not_efficient": (SPARSE, NOT_EFFICIENT | {"num_queries": 8}, THREE_IMAGES),
    "sparse_own_head": (SPARSE, NOT_EFFICIENT | {"eff_specific_head": True}, THREE_IMAGES),
    "smca": (SMCA, {"enc_layers": 1, "dec_layers": 2, "dynamic_scale": "type2"}, ONE_MAP),
    "smca_products": (
        SMCA,
        {"dynamic_scale": "type4", "stride": 16, "nhead": 4, "class_logits": 8, "num_classes": 7},
        ONE_MAP,
    ),
    "smca_multi_scale": (
        SMCA_MULTI_SCALE,
        {"d": 32, "ff": 20, "dec": 2, "joint": [1, 0], "factors": [1, 2, 3], "beta": 4},
        TWO_MAPS,
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_round_trip(setting: str) -> None:
    layout, changes, inputs = SETTINGS[setting]
    fixture = write(layout, changes, **inputs)
    if layout is SPARSE:
        fixture.info["loss"]["losses"].update(kept_attention_of(fixture))
    compare(Comparison(fixture))
    names = fixture.expected_names
    decoder_layers = fixture.config.get("dec_layers") or fixture.config["dec"]
    assert {name for name in names if "/logits." in name} == {
        f"out/logits.{layer}" for layer in range(decoder_layers)
    }
    assert "inter/hs" in names and len([name for name in names if name[:5] == "post/"]) == 9


def kept_attention_of(fixture: Fixture) -> dict[str, float]:
    """What the official code logs of the selection."""
    model = sparse_detr.build_sparse_detr(fixture).train()
    run = start_sparse(model, fixture)
    selected = torch.zeros_like(run.selection.scores)
    selected.scatter_(1, run.selection.indices[0], 1.0)
    attention = run.output.decoder.token_attention
    share = (attention * selected).sum(1) / attention.sum(1)
    return {"corr_mask_attn_map_dec_all": share.mean().item()}


@pytest.fixture(scope="module")
def pre_norm() -> Fixture:
    torch.manual_seed(0)
    return write(DETR, {"pre_norm": True}, **ONE_MAP)


@pytest.mark.parametrize(
    "name", ["inter/memory", "inter/mask.0", "out/boxes.0", "post/1.labels", "loss/match.0.2.src"]
)
def test_a_wrong_number_fails(pre_norm: Fixture, name: str) -> None:
    value = pre_norm.tensors[name].clone()
    if value.is_floating_point():
        value.view(-1)[3] += 0.01
    else:
        value.view(-1)[1] = 1 - value.view(-1)[1].long()
    tensors = pre_norm.tensors | {name: value}
    with pytest.raises(AssertionError, match=re.escape(name.removesuffix(".labels"))):
        compare(Comparison(dataclasses.replace(pre_norm, tensors=tensors)))


@pytest.mark.parametrize("key", ["losses", "weighted_total", "grad_norm"])
def test_a_wrong_number_in_the_json_fails(pre_norm: Fixture, key: str) -> None:
    value = pre_norm.info["loss"][key]
    if isinstance(value, dict):
        name = next(iter(value))
        wrong: Any = value | {name: value[name] * 1.01}
    else:
        wrong = value * 1.01
    info = pre_norm.info | {"loss": pre_norm.info["loss"] | {key: wrong}}
    with pytest.raises(AssertionError):
        compare(Comparison(dataclasses.replace(pre_norm, info=info)))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("config", "activation", "gelu"),
        ("config", "eos_coef", 0.2),
        ("config", "matcher", {"cls": 500, "bbox": 0, "giou": 0}),
        ("loss", "weight_dict", {"loss_ce": 1.5}),
    ],
)
def test_settings_of_the_json_are_used(
    pre_norm: Fixture, part: str, key: str, value: object
) -> None:
    """With another setting than the fixture was made with, something must differ."""
    given = pre_norm.info[part]
    if isinstance(given.get(key), dict) and isinstance(value, dict):
        value = given[key] | value
    info = pre_norm.info | {part: given | {key: value}}
    with pytest.raises(AssertionError):
        compare(Comparison(dataclasses.replace(pre_norm, info=info)))


def test_unknown_activation(pre_norm: Fixture) -> None:
    info = pre_norm.info | {"config": pre_norm.info["config"] | {"activation": "glu"}}
    with pytest.raises(ValueError, match="unknown activation 'glu'"):
        compare(Comparison(dataclasses.replace(pre_norm, info=info)))


def test_unknown_tensors(pre_norm: Fixture) -> None:
    """Ours must all be known; in others' folders an unknown intermediate one is a warning."""
    for name, strict in (("inter/new", True), ("out/new", False), ("grad/new", False)):
        tensors = pre_norm.tensors | {name: torch.zeros(1)}
        extended = dataclasses.replace(pre_norm, tensors=tensors)
        with pytest.raises((AssertionError, KeyError)):
            compare(Comparison(extended, strict=strict))
    extended = dataclasses.replace(
        pre_norm, tensors=pre_norm.tensors | {"inter/new": torch.zeros(1)}
    )
    with pytest.warns(UserWarning, match="not compared: .*inter/new"):
        compare(Comparison(extended, strict=False))


def test_weights_by_recipe() -> None:
    """Each weight from its own seed; aliases repeat a weight."""
    row = {"shape": [2, 3], "seed": 5, "std": 0.5, "mean": 1.0}
    info = {
        "weights": "recipe",
        "weight_recipe": {"params": {"a.weight": row}},
        "weight_aliases": {"b.weight": "a.weight", "c.weight": "absent"},
    }
    weights = Fixture(info, {}).weights()
    assert weights.keys() == {"a.weight", "b.weight"}
    expected = np.random.RandomState(5).standard_normal((2, 3)) * 0.5 + 1.0
    for tensor in weights.values():
        assert tensor.dtype is torch.float32
        assert tensor.equal(torch.from_numpy(expected.astype("float32")))
    with pytest.raises(ValueError, match="unknown weights 'downloaded'"):
        Fixture({"weights": "downloaded"}, {}).weights()


def test_recipe_of_a_scalar() -> None:
    rows = {"a": {"shape": [], "seed": 1, "std": 1.0, "mean": 0.0}}
    assert recipe_weights(rows)["a"].shape == ()
