"""Formats of Hugging Face's transformers, whose releases name things differently."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig
from torch import Tensor, nn

from efficient_detr.checkpoint.conversion import write_keys
from efficient_detr.checkpoint.convert import convert_checkpoint, export_checkpoint
from efficient_detr.checkpoint.formats import recognize_format
from efficient_detr.checkpoint.hugging_face import huggingface_resnet
from efficient_detr.checkpoint.report import ConversionReport
from efficient_detr.errors import UserError
from tests.building import without_storage
from tests.checkpoint.manifest_files import check_format, load_manifest
from tests.checkpoint.tiny_detectors import WIDTHS, random_weights, tiny_detector

CONFIGS = Path(__file__).parents[2] / "configs"
BACKBONE = "model.backbone.conv_encoder.model."
COCO_IDS = 91

# Model -> config.
MODELS = {
    "detr_r50": "detr",
    "detr_r50_dc5": "detr_dc5",
    "deformable_detr_r50": "deformable_detr",
    "deformable_detr_r50_single_scale": "deformable_detr_single_scale",
    "deformable_detr_r50_refine": "deformable_detr_refine",
    "deformable_detr_r50_two_stage": "deformable_detr_two_stage",
}
# Release -> beginning of manifests, end of formats.
RELEASES = {"4": ("huggingface_", ""), "5": ("huggingface_v5_", "_v5")}


def format_name(model: str, release: str) -> str:
    detector = "detr" if model.startswith("detr") else "deformable_detr"
    return f"huggingface_{detector}{RELEASES[release][1]}"


@functools.cache
def build(model: str) -> nn.Module:
    """The model of a config, without storage."""
    config = LazyConfig.load(str(CONFIGS / f"{MODELS[model]}.py")).model
    config.num_classes = COCO_IDS
    built: nn.Module = without_storage(config)
    return built


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("model", MODELS)
def test_a_published_layout_is_read_and_written(model: str, release: str) -> None:
    name = RELEASES[release][0] + model
    found = recognize_format(load_manifest(name).shapes.keys())
    assert found is not None and found.name == format_name(model, release)
    check_format(name, found.name, functools.partial(build, model))


@dataclass(frozen=True)
class Written:
    """A tiny model, random weights for it, and the same weights as the library has them."""

    model: nn.Module
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]


def tiny(variant: str, num_classes: int = COCO_IDS, **sizes: Any) -> nn.Module:
    """A tiny model; the variant is a function of the models' configs."""
    file = "detr" if variant == "detr" else "deformable_detr"
    return tiny_detector(file, variant, num_classes=num_classes, **sizes)


def written(variant: str, release: str = "4", **sizes: Any) -> Written:
    """A tiny model with random weights as the library has them."""
    model = tiny(variant, **sizes)
    weights = random_weights(model)
    return Written(model, weights, export_checkpoint(weights, format_name(variant, release)))


def assert_becomes_ours(state: dict[str, Tensor], given: Written) -> ConversionReport:
    """The state becomes the weights bit for bit."""
    conversion = convert_checkpoint(state, model=given.model)
    assert conversion.state.keys() == given.ours.keys()
    assert all(torch.equal(tensor, given.ours[key]) for key, tensor in conversion.state.items())
    return conversion.report


def test_query_key_and_value_projections_are_packed_in_this_order() -> None:
    given = written("detr")
    packed = given.ours["detector.decoder.layers.1.cross_attention.in_proj_weight"]
    for part, letter in zip(packed.chunk(3), "qkv", strict=True):
        key = f"model.decoder.layers.1.encoder_attn.{letter}_proj.weight"
        assert torch.equal(part, given.theirs[key])


def test_a_projection_without_its_siblings_is_an_error() -> None:
    given = written("detr")
    del given.theirs["model.decoder.layers.1.encoder_attn.k_proj.weight"]
    with pytest.raises(UserError, match="encoder_attn"):
        convert_checkpoint(given.theirs, model=given.model)


@pytest.mark.parametrize("variant", ["detr", "deformable_detr_two_stage"])
def test_releases_name_alike_what_they_have_in_common(variant: str) -> None:
    old, new = written(variant, "4").theirs, written(variant, "5")
    renamed = {
        key.replace(".conv_encoder.", ".")
        .replace(".out_proj.", ".o_proj.")
        .replace(".fc", ".mlp.fc")
        for key in old
    }
    assert renamed == new.theirs.keys() != old.keys()
    assert_becomes_ours(new.theirs, new)


# Files as the library saves them -----------------------------------------------------------------


def test_a_backbone_built_by_the_library_is_read() -> None:
    given = written("detr")
    backbone = {
        key.removeprefix("detector.backbone."): tensor
        for key, tensor in given.ours.items()
        if key.startswith("detector.backbone.")
    }
    own = write_keys(backbone, huggingface_resnet())
    assert own["embedder.embedder.convolution.weight"].shape == (WIDTHS[0], 3, 7, 7)
    last = own["encoder.stages.3.layers.0.shortcut.normalization.running_var"]
    assert last.shape == (WIDTHS[3],)
    other = {key: tensor for key, tensor in given.theirs.items() if not key.startswith(BACKBONE)}
    other |= {BACKBONE + key: tensor for key, tensor in own.items()}
    assert len(other) == len(given.theirs)
    assert_becomes_ours(other, given)


@pytest.mark.parametrize(
    "counter",
    [
        "layer2.0.bn1.num_batches_tracked",
        "encoder.stages.0.layers.2.layer.1.normalization.num_batches_tracked",
    ],
)
def test_counters_of_batches_are_dropped(counter: str) -> None:
    given = written("detr")
    given.theirs[BACKBONE + counter] = torch.tensor(7)
    assert list(assert_becomes_ours(given.theirs, given).dropped) == [BACKBONE + counter]


REPEATED = r"(class|bbox)_embed\.[1-9]"
OUTER_BOXES = r"bbox_embed"
OUTER = r"(class|bbox)_embed"
INNER = r"model\.decoder\.(class|bbox)_embed"


@pytest.mark.parametrize(
    ("variant", "left_out"),
    [
        ("deformable_detr", REPEATED),
        ("deformable_detr_refine", OUTER_BOXES),
        ("deformable_detr_refine", INNER),
        ("deformable_detr_two_stage", OUTER),
        ("deformable_detr_two_stage", INNER),
    ],
)
def test_heads_are_found_wherever_they_are_saved(variant: str, left_out: str) -> None:
    """Files in safetensors have each weight once, under one of its names."""
    given = written(variant)
    part = {key: tensor for key, tensor in given.theirs.items() if not re.match(left_out, key)}
    assert len(part) < len(given.theirs)
    assert_becomes_ours(part, given)


@pytest.mark.parametrize("kept", ["class_embed.0.", "class_embed.1."])
def test_a_class_layer_that_all_layers_share(kept: str) -> None:
    """Release 5 ties the class layers of refined boxes, and saves one of them."""
    given = written("deformable_detr_refine", "5")
    for key in list(given.theirs):
        if key.startswith("class_embed.") and not key.startswith(kept):
            del given.theirs[key]
    for name in given.ours:
        if ".class_layer." in name:
            given.ours[name] = given.theirs[kept + name.rpartition(".")[2]]
    assert_becomes_ours(given.theirs, given)


def test_a_single_level_is_that_of_the_last_map() -> None:
    sizes = {"in_features": ["res5"], "in_channels": [WIDTHS[3]], "num_levels": 1}
    given = written("deformable_detr", **sizes)
    assert given.theirs["model.input_proj.0.0.weight"].shape == (16, WIDTHS[3], 1, 1)
    assert_becomes_ours(given.theirs, given)


def test_rows_of_classes_go_to_80_classes_but_proposals_keep_their_first() -> None:
    """Proposals are ranked by their first row, whichever class it belongs to."""
    theirs = written("deformable_detr_two_stage").theirs
    model = tiny("deformable_detr_two_stage", num_classes=80)
    ours = convert_checkpoint(theirs, model=model).state
    decoder = ours["detector.decoder.heads.1.class_layer.bias"]
    # COCO's first, twelfth and last classes have category numbers 1, 13 and 90.
    assert torch.equal(decoder[[0, 11, 79]], theirs["class_embed.1.bias"][[1, 13, 90]])
    proposals = ours["detector.proposals.head.class_layer.bias"]
    assert torch.equal(proposals, theirs["class_embed.2.bias"][:80])
