"""Fixtures of official numbers: one module for each family of models, and the table of families.

A new family is a module with a function that takes a `Comparison`, builds the model from the JSON's
`config` and compares every tensor by its name, and a row in the table. What models have in common
is in `transformer` and `training`.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.golden_families import (
    act_attention,
    act_detr,
    dat,
    dat_attention,
    deformable_attention,
    deformable_detr,
    detr,
    detr_functions,
    dino,
    dino_training,
    smca,
    smca_parts,
    sparse_detr,
)
from tests.golden_families.fixture import Comparison

FAMILIES: dict[str, dict[str, Callable[[Comparison], None]]] = {
    "act_attention": {"eval": act_attention.compare},
    "act_detr": {"eval": act_detr.compare},
    "dat": {"eval": dat.compare},
    "dat_attention_op": {"eval": dat_attention.compare},
    "dat_detection": {"eval": dat.compare},
    "dat_pp": {"eval": dat.compare},
    "deformable_detr": {"eval": deformable_detr.compare},
    "detr": {"eval": detr.compare},
    "detr_functions": {"eval": detr_functions.compare},
    "dino": {"eval": dino.compare_evaluation, "train": dino_training.compare_training},
    "focus_detr": {"eval": dino.compare_evaluation, "train": dino_training.compare_training},
    "ms_deform_attn_op": {"eval": deformable_attention.compare},
    "smca": {"eval": smca.compare_single},
    "smca_conv": {"eval": smca.compare_conv},
    "smca_conv_encoder": {"eval": smca_parts.compare_conv_encoder},
    "smca_multi_scale": {"eval": smca.compare_multi_scale},
    "smca_scale_types": {"eval": smca_parts.compare_scale_types},
    "sparse_detr": {"eval": sparse_detr.compare},
}
"""For each family and mode what compares a fixture."""


def compare(comparison: Comparison) -> None:
    """Compare everything in a fixture.

    Raises:
        ValueError: if the fixture is of a family or a mode that nobody can compare.
    """
    info = comparison.fixture.info
    for kind, value, known in (
        ("family", info["family"], FAMILIES),
        ("mode", info["mode"], FAMILIES.get(info["family"], {})),
    ):
        if value not in known:
            raise ValueError(f"unknown {kind} {value!r} of a golden fixture: know {sorted(known)}")
    FAMILIES[info["family"]][info["mode"]](comparison)
    comparison.finish()
