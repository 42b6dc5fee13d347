"""Published checkpoints of DAT, DAT++ and Swin -> ours -> as they were."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from safetensors.torch import load_file
from torch import Tensor

from efficient_detr.checkpoint.backbones import BACKBONE_FORMATS, export_backbone
from efficient_detr.checkpoint.layout import Shape
from efficient_detr.errors import UserError
from efficient_detr.modeling.backbones.dat import FEATURES
from efficient_detr.modeling.backbones.dat_variants import VARIANTS, dat
from tests.checkpoint.manifest_files import load_manifest, manifest_names
from tests.checkpoint.test_backbones import (
    TESTS,
    TINY_STAGES,
    assert_filled,
    below,
    classifier,
    converted,
    detection_state,
    meta,
    published_model,
    swin,
    tiny_config,
)

CONSTANTS = ("relative_position_index", "attn_mask")
State = dict[str, Tensor]

# Models that the layouts are tried on; nothing in the one with 384 pixels depends on this size.
MODELS: dict[str, Any] = {
    "dat_plus_plus_ablation": lambda: meta(
        dat(VARIANTS["dat_plus_plus_tiny"].stages, out_features=["p3"])
    ),
    "swin_tiny": lambda: swin(out_indices=(3,)),
}


@pytest.fixture(scope="module")
def pool() -> Tensor:
    """Random numbers, of which every weight takes some."""
    return torch.rand(6_000_000, generator=torch.Generator().manual_seed(0))


def random_weights(shapes: dict[str, Shape], pool: Tensor) -> State:
    """Weights that differ from each other in all their values."""
    return {
        key: pool[number : number + torch.Size(shape).numel()].view(shape)
        for number, (key, shape) in enumerate(shapes.items())
    }


def assert_written_as_it_was(written: State, state: State) -> None:
    """Equal keys, and equal values but of constants, which only have equal shapes."""
    assert written.keys() == state.keys()
    for key, tensor in state.items():
        assert written[key].shape == tensor.shape
        assert key.endswith(CONSTANTS) or torch.equal(written[key], tensor), key


@pytest.mark.parametrize("manifest", manifest_names("official_dat*") + ["official_swin_tiny"])
def test_classifiers(manifest: str, pool: Tensor) -> None:
    name = manifest.removeprefix("official_")
    state = random_weights(load_manifest(manifest).shapes, pool)
    model = classifier(MODELS[name]() if name in MODELS else published_model(name, "p3"))
    result = converted(state, model)
    assert_filled(result, model)
    written = export_backbone(result.state, "swin" if name == "swin_tiny" else "dat")
    assert_written_as_it_was(written, state)


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_backbones_of_detectors(name: str, pool: Tensor) -> None:
    variant = f"dat_plus_plus_{name}"
    shapes = {key: tuple(tensor.shape) for key, tensor in detection_state(variant).items()}
    inside = {key: shape for key, shape in shapes.items() if key.startswith("backbone.")}
    state = random_weights(inside, pool)
    model = below("detector.backbone", published_model(variant, *FEATURES))
    result = converted(state, model)
    assert_filled(result, model)
    other = {"detector.neck.convs.0.weight": torch.zeros(1), "detector.head.weight": pool}
    written = export_backbone(result.state | other, "dat")
    assert_written_as_it_was({f"backbone.{key}": written[key] for key in written}, state)


def test_constants_are_those_of_the_published_code() -> None:
    tensors = load_file(TESTS / "golden/dat_tiny.safetensors")
    state = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("w.")}
    model = classifier(instantiate(tiny_config()), num_classes=10)
    written = export_backbone(converted(state, model).state, "dat")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
    assert sum(key.endswith(CONSTANTS) for key in written) == 5 + 1


def test_indices_of_swin_are_those_of_detectron2() -> None:
    """Ours are stored with our weights; those of another file are made anew."""
    model = swin(window_size=3, embed_dim=8, num_heads=(1, 2, 4, 8), out_indices=(1, 2, 3))
    ours = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    written = export_backbone(ours, "swin")
    made = {key: tensor for key, tensor in written.items() if key not in ours}
    fresh = type(model)(
        embed_dim=8, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8), window_size=3, drop_path_rate=0.0
    )
    for name, index in fresh.named_buffers():
        assert torch.equal(made.pop(name), index)
    # Maps of 24, 12, 6 and 3 cells: the last one has a single window.
    masks = {(1, 0): 64, (1, 1): 16, (1, 2): 4, (3, 2): 4, (5, 2): 4}
    assert {key: tensor.shape for key, tensor in made.items()} == {
        f"layers.{stage}.blocks.{block}.attn_mask": (windows, 9, 9)
        for (block, stage), windows in masks.items()
    }


@pytest.mark.parametrize("detects", [False, True])
def test_names_of_layer_scales_tell_the_code(detects: bool) -> None:
    config = tiny_config()
    config.stages[0].blocks[1].layer_scale = 0.5
    backbone = meta(config)
    model = below("backbone", backbone) if detects else classifier(backbone, 3)
    written = export_backbone(model.state_dict(), "dat")
    scales = [key for key in written if "layer_scales" in key]
    factors = "gamma" if detects else "weight"
    assert scales == [f"stages.0.layer_scales.{number}.{factors}" for number in (2, 3)]
    assert ("norms.3.norm.weight" in written) == detects
    assert ("cls_norm.norm.weight" in written) == (not detects)


def test_every_second_window_attention_is_shifted() -> None:
    stages = [
        dataclasses.replace(TINY_STAGES[0], attention="LSLS"),
        dataclasses.replace(TINY_STAGES[1], attention="DLSD"),
        *TINY_STAGES[2:],
    ]
    model = meta(dat(stages, image_size=96, window=3))
    written = export_backbone(model.state_dict(), "dat")
    masks = {key: tuple(tensor.shape) for key, tensor in written.items() if key.endswith("mask")}
    assert masks == {
        "stages.0.attns.1.attn_mask": (64, 9, 9),
        "stages.0.attns.3.attn_mask": (64, 9, 9),
        "stages.1.attns.2.attn_mask": (16, 9, 9),
    }


def test_masks_need_the_size_of_images() -> None:
    """It is known only from the tables of deformable attention."""
    stages = [dataclasses.replace(stage, attention="LS") for stage in TINY_STAGES]
    written = export_backbone(meta(dat(stages, image_size=96, window=3)).state_dict(), "dat")
    assert sum(key.endswith("index") for key in written) == 8
    assert not any(key.endswith("mask") for key in written)


def test_what_cannot_be_written_is_named() -> None:
    model = below("backbone", published_model("dat_tiny"))
    with pytest.raises(UserError, match=r"w\.pth cannot be written as Swin .*no such backbone"):
        export_backbone(model.state_dict(), "swin", "w.pth")
    names = ", ".join(one.name for one in BACKBONE_FORMATS)
    with pytest.raises(UserError, match=f"no backbone format 'dta': know {names}"):
        export_backbone(model.state_dict(), "dta")
    extra = {"backbone.stages.0.blocks.0.attention.gate": torch.zeros(1)}
    with pytest.raises(UserError, match=r"no place for stages\.0\.blocks\.0\.attention\.gate"):
        export_backbone(model.state_dict() | extra, "dat")
