"""ResNets of Caffe2, which Detectron2's configs start from, under Detectron2's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_detr.checkpoint.conversion import Drop, Rename, Row, read_keys

_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
# A batch norm in its frozen form, a scale and an offset, and a group norm.
_NORMS = {"bn_s": "weight", "bn_b": "bias", "gn_s": "weight", "gn_b": "bias"}
_MARK = "conv1_w"


def rename_resnet(arrays: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give a ResNet the names of Detectron2.

    Caffe2 stores what a frozen norm does, not what it was made of: means of 0 and variances of 1
    are added, as Detectron2 does when it loads such a file.

    Args:
        arrays: name in Caffe2 -> array.

    Returns:
        Name in Detectron2 -> array; None if this is no ResNet, or more than one.
    """
    if _MARK not in arrays:
        return None
    read = read_keys(arrays, _resnet())
    if read.unknown:
        return None
    renamed = dict(read.state)
    for name, (key,) in read.sources.items():
        if key.endswith("bn_s"):
            norm = name.removesuffix("weight")
            renamed[f"{norm}running_mean"] = np.zeros_like(arrays[key])
            renamed[f"{norm}running_var"] = np.ones_like(arrays[key])
    return renamed


def _resnet() -> list[Row]:
    rows: list[Row] = [
        Drop("conv1_b", "Detectron2 has no bias before a norm"),
        *(row for head in ("fc1000", "pred") for row in _weighted(head, "stem.fc")),
        Rename("conv1_w", "stem.conv1.weight"),
        *_normed("res_conv1_", "stem.conv1."),
        *_normed("conv1_", "stem.conv1."),
    ]
    for number, name in _BRANCHES.items():
        theirs, ours = f"res{{stage}}_{{block}}_branch{number}", f"res{{stage}}.{{block}}.{name}"
        rows += [Rename(f"{theirs}_w", f"{ours}.weight"), *_normed(f"{theirs}_", f"{ours}.")]
    return rows


def _weighted(theirs: str, ours: str) -> list[Row]:
    return [Rename(f"{theirs}_w", f"{ours}.weight"), Rename(f"{theirs}_b", f"{ours}.bias")]


def _normed(theirs: str, ours: str) -> list[Row]:
    return [Rename(f"{theirs}{key}", f"{ours}norm.{name}") for key, name in _NORMS.items()]
