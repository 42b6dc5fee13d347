"""Formats of the official repositories, by lists of keys and shapes.

The lists were taken from the authors' models at full size, for 91 classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig
from torch import Tensor, nn

from efficient_detr.checkpoint.conversion import convert_keys, read_keys
from efficient_detr.checkpoint.convert import convert_checkpoint, export_checkpoint
from efficient_detr.checkpoint.formats import find_format, recognize_format
from efficient_detr.errors import UserError
from tests.building import without_storage
from tests.checkpoint.manifest_files import check_format, load_manifest, meta_state, random_state
from tests.test_parameter_counts import official_model

MODELS = Path(__file__).parents[2] / "configs" / "common" / "models"

State = dict[str, Tensor]


def config(file: str, **arguments: Any) -> Any:
    return LazyConfig.load(str(MODELS / f"{file}.py"), file)(num_classes=91, **arguments)


def efficient_detr() -> nn.Module:
    """Sparse DETR's queries behind the encoder of Deformable DETR."""
    two_stage = LazyConfig.load(str(MODELS / "deformable_detr.py"), "deformable_detr_two_stage")
    node = two_stage(num_classes=91)
    node.detector.queries = config("sparse_detr").detector.queries
    model: nn.Module = without_storage(node)
    return model


# Manifest without `official_`: (format, name of the model if it is another, or how to build it).
PUBLISHED: dict[str, tuple[str, str | Callable[[], nn.Module]]] = {
    "detr_r50": ("detr", ""),
    "detr_r50_dc5": ("detr", ""),
    "detr_r101": ("detr", ""),
    "act_r50": ("detr", "act_detr_r50"),
    "act_r50_dc5": ("detr", "act_detr_r50_dc5"),
    "deformable_detr_r50": ("deformable_detr", ""),
    "deformable_detr_r50_single_scale": ("deformable_detr", ""),
    "deformable_detr_r50_single_scale_dc5": ("deformable_detr", ""),
    "deformable_detr_r50_refine": ("deformable_detr", ""),
    "deformable_detr_r50_two_stage": ("deformable_detr", "deformable_detr_r50_refine_two_stage"),
    "efficient_detr_r50": ("deformable_detr", efficient_detr),
    "sparse_detr_r50": ("sparse_detr", "sparse_detr_r50_rho_0.3"),
    "dino_r50_4scale": ("dino", lambda: without_storage(config("dino"))),
}
# A label that is not there has a row as well, which nothing reads.
GIVEN = {
    "dino_r50_4scale": {
        "label_enc.weight": torch.rand(92, 256).index_fill(0, torch.tensor(91), 0.0)
    }
}
published = pytest.mark.parametrize("name", PUBLISHED)


@published
def test_a_published_layout_is_read_and_written(name: str) -> None:
    layout, _ = PUBLISHED[name]
    check_format(f"official_{name}", layout, lambda: published_model(name), GIVEN.get(name))


def published_model(name: str) -> nn.Module:
    _, model = PUBLISHED[name]
    return model() if callable(model) else official_model(model or name)


def converted(state: State, *, count: int | None = None) -> State:
    """A file under our names, by the table of its format; maybe `count` keys are dropped."""
    found = recognize_format(state)
    assert found is not None
    read = read_keys(state, found.read_table({key: tuple(state[key].shape) for key in state}))
    assert read.unknown == [] and read.different == []
    assert count is None or len(read.dropped) == count
    return read.state


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("detr_r50", 0),
        # A head has 2 + 6 tensors: a linear layer and a perceptron of three. One of six copies is
        # kept.
        ("deformable_detr_r50", 5 * 8),
        # Six box heads once more below the decoder.
        ("deformable_detr_r50_refine", 6 * 6),
        # Seven heads once more below the decoder, the last of which is that of the proposals.
        ("deformable_detr_r50_two_stage", 7 * 8),
        # Twelve heads once more below the decoder, five of them also below the encoder.
        ("sparse_detr_r50", 12 * 8 + 5 * 8),
        # Six heads once more below the decoder.
        ("dino_r50_4scale", 6 * 8),
    ],
)
def test_copies_are_dropped(name: str, copies: int) -> None:
    converted(meta_state(load_manifest(f"official_{name}")), count=copies)


# What parts are called ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "self_attention", "cross_attention"),
    [
        ("detr_r50", 1, 2),
        ("deformable_detr_r50", 2, 1),
        ("sparse_detr_r50", 2, 1),
        ("dino_r50_4scale", 2, 1),
    ],
)
def test_norms_in_the_order_of_execution(
    name: str, self_attention: int, cross_attention: int
) -> None:
    """Deformable DETR normalises self-attention with `norm2`, cross-attention with `norm1`."""
    state = meta_state(load_manifest(f"official_{name}"))
    ours = converted(state)
    numbers = {"self_attention_norm": self_attention, "cross_attention_norm": cross_attention}
    for norm, number in (numbers | {"feedforward_norm": 3}).items():
        theirs = state[f"transformer.decoder.layers.5.norm{number}.bias"]
        assert ours[f"detector.decoder.layers.5.{norm}.bias"] is theirs


def test_numbers_of_heads() -> None:
    """Three decoder layers: heads 0 to 2; then the proposals', then those of encoder layers."""
    layers = [f"transformer.decoder.layers.{layer}.norm1.weight" for layer in range(3)]
    keys = [f"class_embed.{number}.weight" for number in range(7)]
    state = {key: torch.zeros(1) for key in [*layers, "transformer.enc_output.weight", *keys]}
    table = find_format("sparse_detr").read_table(dict.fromkeys(state, (1,)))
    sources = read_keys(state, table).sources
    assert {key: name for name, (key,) in sources.items() if key in keys} == {
        key: f"detector.{ours}.class_layer.weight"
        for key, ours in zip(
            keys,
            [
                *(f"decoder.heads.{layer}" for layer in range(3)),
                "proposals.head",
                *(f"encoder_heads.heads.{layer}" for layer in range(3)),
            ],
            strict=True,
        )
    }


def test_levels_beyond_the_maps_of_the_backbone() -> None:
    """Levels made by 3x3 convolutions are further ones: here two maps and five levels."""
    kernels = [1, 1, 3, 3, 3]
    state = {
        f"input_proj.{level}.{part}.{kind}": torch.empty(
            (4, 4, kernel, kernel) if (part, kind) == ("0", "weight") else (4,), device="meta"
        )
        for level, kernel in enumerate(kernels)
        for part in "01"
        for kind in ("weight", "bias")
    }
    for layout in ("deformable_detr", "sparse_detr", "dino"):
        table = find_format(layout).read_table({k: tuple(v.shape) for k, v in state.items()})
        assert set(convert_keys(state, table)) == {
            f"detector.neck.{conv}.{name}"
            for conv in ("convs.0", "convs.1", *(f"extra_convs.{level}" for level in range(3)))
            for name in ("weight", "bias", "norm.weight", "norm.bias")
        }


def test_pre_norm_weights_fill_the_model() -> None:
    """The pre-norm model has the keys of the other one and a norm after the encoder."""
    detr, pre_norm = LazyConfig.load(str(MODELS / "detr.py"), ("detr", "pre_norm"))
    state = meta_state(load_manifest("official_detr_r50"))
    for kind in ("weight", "bias"):
        state[f"transformer.encoder.norm.{kind}"] = torch.empty(256, device="meta")
    model = without_storage(pre_norm(detr(num_classes=91)))
    assert set(converted(state)) == set(model.state_dict())


@published
@pytest.mark.parametrize("key", ["transformer.encoder.layers.0.norm4.weight", "norm.weight", ""])
def test_unknown_keys_are_named(name: str, key: str) -> None:
    shapes = load_manifest(f"official_{name}").shapes
    table = find_format(PUBLISHED[name][0]).read_table(shapes)
    with pytest.raises(KeyError, match=re.escape(f"no rule for checkpoint key {key}: ")):
        convert_keys({key: torch.zeros(1)}, table)


# Traps -------------------------------------------------------------------------------------------


def test_what_a_profiler_left_behind_is_dropped() -> None:
    state = meta_state(load_manifest("official_deformable_detr_r50"))
    counters = ["transformer.encoder.layers.0.total_ops", "class_embed.0.total_params"]
    counted = state | dict.fromkeys(counters, torch.zeros(1))
    conversion = convert_checkpoint(counted, model=official_model("deformable_detr_r50"))
    assert set(counters) <= set(conversion.report.dropped)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("deformable_detr_r50", "class_embed.3.bias"),
        ("deformable_detr_r50_refine", "transformer.decoder.bbox_embed.2.layers.2.bias"),
        ("sparse_detr_r50", "transformer.encoder.class_embed.4.bias"),
        ("dino_r50_4scale", "transformer.decoder.class_embed.0.bias"),
    ],
)
def test_copies_that_differ_are_an_error(name: str, key: str) -> None:
    """Which of the two would be right?"""
    manifest = load_manifest(f"official_{name}")
    state = meta_state(manifest)
    for same in {key, manifest.aliases.get(key, key)}:
        state[same] = torch.zeros(manifest.shapes[key])
    for same, source in manifest.aliases.items():
        if source in (key, manifest.aliases.get(key)):
            state[same] = torch.zeros(manifest.shapes[key])
    state[key] = torch.ones(manifest.shapes[key])
    with pytest.raises(UserError, match=re.escape(key)):
        convert_checkpoint(state)


COCO_IDS = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]


@pytest.mark.parametrize(
    ("name", "first_row_decides"),
    [
        ("deformable_detr_r50_two_stage", True),
        ("sparse_detr_r50", False),
        ("dino_r50_4scale", False),
    ],
)
def test_the_proposals_of_80_classes(name: str, first_row_decides: bool) -> None:
    """Deformable DETR ranks proposals by the first row, which no class may take the place of."""
    rows = torch.arange(91.0)
    state = meta_state(load_manifest(f"official_{name}"))
    for key in state:
        if re.search(r"class_embed(\.\d+)?\.bias", key):
            state[key] = rows
    ours = convert_checkpoint(state).state
    remapped = torch.tensor(COCO_IDS, dtype=torch.float32)
    assert torch.equal(ours["detector.decoder.heads.5.class_layer.bias"], remapped)
    proposals = ours["detector.proposals.head.class_layer.bias"]
    assert torch.equal(proposals, rows[:80] if first_row_decides else remapped)


def test_heads_of_dino_may_differ() -> None:
    """Every layer of ours has a head; so may the authors', under the same keys."""
    state = random_state(load_manifest("official_dino_r50_4scale"))
    ours = converted(state)
    assert ours["detector.decoder.heads.4.class_layer.bias"] is state["class_embed.0.bias"]
    changed = torch.rand(91)
    ours["detector.decoder.heads.4.class_layer.bias"] = changed
    written = export_checkpoint(ours, "dino")
    assert written["class_embed.4.bias"] is changed
    assert written["transformer.decoder.class_embed.4.bias"] is changed
    assert torch.equal(written["class_embed.3.bias"], state["class_embed.0.bias"])
    assert torch.equal(converted(written)["detector.decoder.heads.4.class_layer.bias"], changed)


# Other backbones and wrappers --------------------------------------------------------------------


def test_the_wrapper_for_detectron2() -> None:
    """It keeps DETR below `detr.`, and Detectron2's backbone inside that."""
    ours = converted(meta_state(load_manifest("official_detr_r50")))
    written = export_checkpoint(ours, "detr_detectron2")
    assert all(key.startswith("detr.") for key in written)
    for theirs, name in (
        ("detr.backbone.0.backbone.res4.5.conv3.norm.bias", "backbone.res4.5.conv3.norm.bias"),
        (
            "detr.transformer.encoder.layers.1.linear1.bias",
            "encoder.layers.1.feedforward.expand.bias",
        ),
        ("detr.class_embed.weight", "decoder.heads.0.class_layer.weight"),
    ):
        assert written[theirs] is ours[f"detector.{name}"]
    found = recognize_format(written)
    assert found is not None and found.name == "detr_detectron2"
    # What training inside the wrapper adds.
    again = converted(written | {"criterion.empty_weight": torch.ones(92)}, count=1)
    assert again.keys() == ours.keys() and all(again[name] is ours[name] for name in ours)


@pytest.mark.parametrize(
    ("file", "layout", "backbone"),
    [("sparse_detr", "sparse_detr", "backbone.0.body."), ("dino", "dino", "backbone.0.")],
)
def test_a_swin_backbone(file: str, layout: str, backbone: str) -> None:
    """Official Swins keep the index of every pair of cells, which Detectron2's may compute."""
    swin = LazyConfig.load(str(MODELS / "backbones.py"), "swin")
    maps = dict(in_features=("p1", "p2", "p3"), in_channels=(192, 384, 768))
    model = without_storage(config(file, backbone=swin("tiny"), **maps))
    ours = model.state_dict()
    written = export_checkpoint(ours, layout)
    found = recognize_format(written)
    assert found is not None and found.name == layout
    block = f"{backbone}layers.2.blocks.5."
    assert written[f"{block}attn.relative_position_index"].shape == (49, 49)
    assert {f"{backbone}patch_embed.proj.weight", f"{backbone}norm3.bias"} <= set(written)
    assert f"{block}attn_mask" not in written
    conversion = convert_checkpoint(written, model=model)
    assert set(ours) == set(conversion.state)


# Files without duplicates ------------------------------------------------------------------------


def without_duplicates(state: dict[str, torch.Tensor], last: bool) -> dict[str, torch.Tensor]:
    """Each tensor under the first or the last of its names, as in files of safetensors."""
    names: dict[int, list[str]] = {}
    for key in state:
        names.setdefault(id(state[key]), []).append(key)
    kept = [max(keys) if last else min(keys) for keys in names.values()]
    return {key: state[key] for key in kept}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "deformable_detr_r50",
        "deformable_detr_r50_refine",
        "deformable_detr_r50_two_stage",
        "sparse_detr_r50",
        "dino_r50_4scale",
    ],
)
def test_files_without_duplicates(name: str, last: bool) -> None:
    """The one name that is left of a shared weight may be that of a copy."""
    manifest = load_manifest(f"official_{name}")
    own = {key: torch.empty(shape, device="meta") for key, shape in manifest.shapes.items()}
    state = {key: own[manifest.aliases.get(key, key)] for key in own}
    part = without_duplicates(state, last)
    assert len(part) < len(state)
    found = recognize_format(part)
    assert found is not None and found.name == PUBLISHED[name][0]
    model = published_model(name)
    whole = convert_checkpoint(state, model=model).state
    ours = convert_checkpoint(part, model=model).state
    assert ours.keys() == whole.keys()
    # Without the row that nothing reads, label embeddings are other tensors.
    assert [key for key in ours if ours[key] is not whole[key]] in (
        [],
        ["detector.denoising.label_embedding.weight"],
    )
