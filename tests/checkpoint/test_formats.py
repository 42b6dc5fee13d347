"""Finding the format of a file by its keys, and formats by their names."""

from __future__ import annotations

import pytest

from efficient_detr.checkpoint.formats import (
    FORMATS,
    OWN_FORMAT,
    describe_unknown,
    find_format,
    is_backbone_format,
    list_formats,
    recognize_format,
)
from efficient_detr.errors import UserError
from tests.checkpoint.manifest_files import load_manifest, manifest_names

BACKBONES = ("official_dat", "official_swin", "torchvision_", "detectron2_")


@pytest.mark.parametrize("name", manifest_names())
def test_published_files_are_of_one_format_at_most(name: str) -> None:
    keys = load_manifest(name).shapes.keys()
    fitting = [one.name for one in FORMATS if one.fits(keys)]
    assert len(fitting) == (0 if name.startswith(BACKBONES) else 1)
    found = recognize_format(keys)
    assert (found and found.name) == (fitting[0] if fitting else None)


def test_our_own_files_are_recognised() -> None:
    keys = ["detector.backbone.stem.conv1.weight", "detector.decoder.heads.0.class_layer.bias"]
    assert recognize_format(keys) is OWN_FORMAT
    assert recognize_format(keys[:1]) is None


def test_names_are_unique_and_found() -> None:
    names = [name for name, _ in list_formats()]
    assert len(set(names)) == len(names)
    for one in FORMATS:
        assert find_format(one.name) is one
        assert not is_backbone_format(one.name)
    assert is_backbone_format("swin") and "swin" in names


def test_an_unknown_name_lists_all() -> None:
    with pytest.raises(UserError, match="no checkpoint format 'dert': .*detr, .*dino, .*swin"):
        find_format("dert")


def test_unknown_keys_are_shown_with_the_nearest_formats() -> None:
    text = describe_unknown(["roi_heads.a", "roi_heads.b", "rpn.c", "rpn.d"])
    assert text == "its keys (roi_heads.a, roi_heads.b, rpn.c, ...) fit no known format"
    keys = [key for key in load_manifest("official_detr_r50").shapes if "encoder" not in key]
    keys = [key for key in keys if not key.startswith(("query_embed", "class_embed"))]
    assert "closest are" in describe_unknown(keys)
