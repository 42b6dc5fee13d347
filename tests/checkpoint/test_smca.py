"""Formats of SMCA-DETR, in all sizes that were published."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from torch import Tensor, nn

from efficient_detr.checkpoint.convert import convert_checkpoint, export_checkpoint
from efficient_detr.checkpoint.formats import recognize_format
from efficient_detr.errors import UserError
from efficient_detr.modeling.attention.gaussian_scale import (
    AxisProductScale,
    AxisScale,
    ConstantScale,
    HeadScale,
)
from tests.building import without_storage
from tests.checkpoint.manifest_files import check_format, load_manifest, meta_state
from tests.checkpoint.tiny_detectors import WIDTHS, random_weights, tiny_resnet

MODELS = Path(__file__).parents[2] / "configs" / "common" / "models" / "smca.py"
COLUMNS = 92
"""Of the published classifiers: COCO's 91 category numbers, and one for no object."""
CLASS_BIAS = "detector.decoder.heads.0.class_layer.bias"

# Manifest -> function of the models' configs, and what differs from its defaults.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "official_smca_r50": ("smca", {}),
    "official_smca_conv_r50_kernel_7": ("smca_conv", {}),
    "official_smca_conv_r50_kernel_5": (
        "smca_conv",
        {"kernel_size": 5, "shared": False, "encoder_layers": 5},
    ),
    "smca_multi_scale_r50": ("smca_multi_scale", {}),
}
SIZES: dict[str, Any] = dict(
    channels=16,
    num_heads=2,
    hidden_channels=24,
    encoder_layers=2,
    decoder_layers=2,
    num_queries=6,
    num_classes=5,
)
# Function -> what else tiny models need.
TINY: dict[str, dict[str, Any]] = {
    "smca": {"in_features": ["res5"], "in_channels": [WIDTHS[3]]},
    "smca_conv": {"in_channels": list(WIDTHS[1:]), "kernel_size": 3},
}


def build(function: str, **sizes: Any) -> nn.Module:
    """A model without storage."""
    model: nn.Module = without_storage(LazyConfig.load(str(MODELS), function)(**sizes))
    return model


def tiny(function: str, **sizes: Any) -> nn.Module:
    """A model with two encoder and two decoder layers."""
    arguments = {"backbone": tiny_resnet(), **SIZES, **TINY[function], **sizes}
    config = LazyConfig.load(str(MODELS), function)(**arguments)
    model: nn.Module = instantiate(config)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout_is_read_and_written(name: str) -> None:
    function, sizes = PUBLISHED[name]
    found = recognize_format(load_manifest(name).shapes.keys())
    assert found is not None and found.name == function
    model = functools.partial(build, function, num_classes=COLUMNS, **sizes)
    check_format(name, function, model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_fit_a_model_for_coco(name: str) -> None:
    function, sizes = PUBLISHED[name]
    model = build(function, **sizes)
    found = convert_checkpoint(meta_state(load_manifest(name)), model=model).state
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in found.items()} == shapes


def test_multi_scale_names_without_a_backbone() -> None:
    """The reconstruction alone has no `smca.` in front of its names."""
    whole = meta_state(load_manifest("smca_multi_scale_r50"))
    prefix = "smca."
    state = {key.removeprefix(prefix): whole[key] for key in whole if key.startswith(prefix)}
    model = build("smca_multi_scale", backbone=None, num_classes=COLUMNS)
    conversion = convert_checkpoint(state, model=model)
    assert conversion.format is not None
    assert conversion.state.keys() == model.state_dict().keys()
    assert export_checkpoint(conversion.state, conversion.format.name).keys() == state.keys()


def round_trip(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """Random weights as they are published, having been read again without a difference."""
    weights = random_weights(model)
    written = export_checkpoint(weights, layout)
    conversion = convert_checkpoint(written, model=model)
    assert conversion.format is not None and conversion.format.name == layout
    assert conversion.state.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in conversion.state.items())
    return written


@pytest.mark.parametrize(
    ("scale", "numbers"),
    [(ConstantScale, None), (HeadScale, 2), (AxisScale, 4), (AxisProductScale, 6)],
)
def test_every_type_of_scale(scale: type, numbers: int | None) -> None:
    written = round_trip(tiny("smca", scale=scale), "smca")
    key = "transformer.decoder.layers.1.point3.weight"
    assert (len(written[key]) if key in written else None) == numbers


@pytest.mark.parametrize("shared", [True, False])
def test_convolutions_between_levels_have_numbers_unless_shared(shared: bool) -> None:
    written = round_trip(tiny("smca_conv", shared=shared), "smca_conv")
    layer = "transformer.encoder.layers.1."
    found = {
        key for key in written if key.startswith((f"{layer}high_to_low", f"{layer}low_to_high"))
    }
    suffixes = [""] if shared else ["_1", "_2", "_3"]
    assert found == {
        f"{layer}{way}{suffix}.{kind}"
        for way in ("high_to_low", "low_to_high")
        for suffix in suffixes
        for kind in ("weight", "bias")
    }


def test_separate_convolutions_keep_their_order() -> None:
    model = tiny("smca_conv", shared=False)
    weights = random_weights(model)
    written = export_checkpoint(weights, "smca_conv")
    ours, theirs = "detector.encoder.layers.0.exchange.", "transformer.encoder.layers.0."
    for pair in range(3):
        down, up = f"high_to_low_{pair + 1}.weight", f"low_to_high_{pair + 1}.weight"
        assert torch.equal(written[theirs + down], weights[f"{ours}down.{pair}.weight"])
        assert torch.equal(written[theirs + up], weights[f"{ours}up.{pair}.weight"])


# Rows of classes ---------------------------------------------------------------------------------


def test_a_model_for_coco_takes_the_rows_of_its_classes() -> None:
    theirs = export_checkpoint(random_weights(tiny("smca", num_classes=COLUMNS)), "smca")
    ours = convert_checkpoint(theirs, model=tiny("smca", num_classes=80)).state
    # COCO's first, twelfth and last classes have category numbers 1, 13 and 90.
    rows = theirs["class_embed.bias"][[1, 13, 90]]
    assert torch.equal(ours[CLASS_BIAS][[0, 11, 79]], rows)
    assert len(ours[CLASS_BIAS]) == 80


def test_no_object_is_never_predicted_by_what_is_written() -> None:
    """The authors' top-k looks at this column as well."""
    weights = random_weights(tiny("smca", num_classes=80))
    written = export_checkpoint(weights, "smca", coco_ids=True)["class_embed.bias"]
    assert len(written) == COLUMNS
    assert written[-1].sigmoid() < 1e-6
    assert torch.equal(written[[1, 13, 90]], weights[CLASS_BIAS][[0, 11, 79]])


@pytest.mark.parametrize("layout", ["detr", "detrex_detr", "smca_conv"])
def test_the_single_scale_model_is_written_as_no_other(layout: str) -> None:
    """Its attention has DETR's weights, and more."""
    with pytest.raises(UserError, match=r"^x.pth cannot be written as [^\n]*\.$"):
        export_checkpoint(random_weights(tiny("smca")), layout, source="x.pth")
