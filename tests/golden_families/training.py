"""Matchings, losses and gradients of the official criterion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_detr.checkpoint import convert_keys
from efficient_detr.checkpoint.conversion import Row
from efficient_detr.meta_arch import EfficientDETR
from tests.golden_families.fixture import Comparison

# Relative tolerances.
LOSSES = 1e-4
GRADIENTS = 1e-3
# Where a gradient vanishes in exact arithmetic (the bias before a norm, the values of queries that
# are zero) its norm is rounding noise: this part of the norm of all gradients together. A group
# norm over the two cells of a coarsest level magnifies it; two right formulations differed by 5e-7
# there.
GRADIENT_NOISE = 2e-6

# What the official criteria compute for the log alone: the share of matched boxes with the wrong
# class, and how far the number of predicted objects is off. Neither is trained on or reported.
LOGGED_ONLY = re.compile(r"(class_error|cardinality_error)(_\w+)?")

# Beginnings of names, official and ours.
NAMES = {"loss_ce": "loss_class", "loss_mask_prediction": "loss_token_selection"}


def our_loss_name(name: str) -> str:
    """`loss_ce_enc_0` -> `loss_class_enc_0`."""
    for theirs, ours in NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def loss_weights(model: EfficientDETR, names: Sequence[str]) -> dict[str, float]:
    """The weight of each official loss in our set loss, for a fixture that does not say."""
    set_loss = model.losses[0]
    weights = {
        "loss_ce": set_loss.class_weight,
        "loss_bbox": set_loss.box_weight,
        "loss_giou": set_loss.giou_weight,
    }
    return {name: weights[re.sub(r"_(enc|\d).*", "", name)] for name in names}


def compare_losses(
    model: EfficientDETR, losses: Mapping[str, Tensor], expected: Mapping[str, Any]
) -> None:
    """Compare our weighted losses with official raw ones.

    Args:
        model: the model with its losses.
        losses: ours, weighted.
        expected: `losses` by official name, their `weighted_total` and maybe a `weight_dict`.
    """
    raw = {
        name: value
        for name, value in expected["losses"].items()
        if not LOGGED_ONLY.fullmatch(name) and not name.startswith("corr_")
    }
    weights = expected.get("weight_dict") or loss_weights(model, list(raw))
    weighted = {our_loss_name(name): weights[name] * value for name, value in raw.items()}
    ours = {name: value.item() for name, value in losses.items()}
    assert ours == pytest.approx(weighted, rel=LOSSES)
    assert sum(ours.values()) == pytest.approx(expected["weighted_total"], rel=LOSSES)


def compare_matchings(matchings: list[Any], num_layers: int, comparison: Comparison) -> None:
    """Compare the pairs of every matching.

    Args:
        matchings: ours, in the order of our losses: decoder layers, then the encoder's.
        num_layers: number of decoder layers. The official order starts with the last of them.
        comparison: the expected pairs.
    """
    calls = [num_layers - 1, *range(num_layers - 1), *range(num_layers, len(matchings))]
    for name, (call, image) in comparison.matches(r"loss/match\.(\d+)\.(\d+)\.src"):
        queries, boxes = matchings[calls[call]][image]
        ours = set(zip(queries.tolist(), boxes.tolist(), strict=True))
        expected = [
            comparison.expect(name.replace("src", side)).tolist() for side in ("src", "tgt")
        ]
        assert ours == set(zip(*expected, strict=True)), name
    compared = {groups[0] for _, groups in comparison.matches(r"loss/match\.(\d+)\.\d+\.src")}
    assert compared in (set(), set(range(len(matchings)))), "matchings that no fixture lists"


def compare_gradient_norms(
    model: nn.Module, norms: Mapping[str, float | None], table: Sequence[Row]
) -> None:
    """Compare the norm of the gradient of every parameter; None stands for no gradient."""
    expected = convert_keys(norms, table)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    noise = GRADIENT_NOISE * sum((norm or 0.0) ** 2 for norm in expected.values()) ** 0.5
    for name, norm in expected.items():
        gradient = gradients[name]
        if norm is None:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            ours = gradient.norm().item()
            assert ours == pytest.approx(norm, rel=GRADIENTS, abs=noise), name


def compare_gradients(
    model: nn.Module, comparison: Comparison, group: str, table: Sequence[Row]
) -> None:
    """Compare the gradients stored as `<group><official key>`, element by element."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, (key,) in comparison.matches(re.escape(group) + "(.*)"):
        expected = comparison.expect(name)
        # A key that is only a copy has an alias that is converted.
        candidates = comparison.fixture.with_aliases({key: expected})
        ((ours, expected),) = convert_keys(candidates, table).items()
        atol = max(GRADIENTS * expected.abs().max().item(), gradient_noise(model))
        torch.testing.assert_close(gradients[ours], expected, atol=atol, rtol=0, msg=name)


def gradient_noise(model: nn.Module) -> float:
    """Rounding noise of the gradients of a model."""
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    return GRADIENT_NOISE * torch.stack(squares).sum().sqrt().item()
