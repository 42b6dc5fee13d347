"""Every encoder with every decoder: what fits together trains, what does not says why."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.losses.distillation import BoxDistillationLoss
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention.clustered import ClusteredEncoderAttention
from efficient_detr.modeling.attention.intra_scale import IntraScaleAttention
from efficient_detr.modeling.attention.spatially_modulated import (
    ScaleSelectiveModulatedAttention,
    SpatiallyModulatedAttention,
)
from efficient_detr.modeling.decoder import PreNormDecoderLayer
from efficient_detr.modeling.distillation import DistillationDetector
from efficient_detr.modeling.encoder import DualAttentionEncoderLayer
from efficient_detr.modeling.pyramid_encoder import PyramidEncoder
from efficient_detr.modeling.queries import LearnedQueries
from efficient_detr.structures import DetectorOutput, Proposals
from tests.combination_parts import CHANNELS, Combination, DecoderKind, config
from tests.combinations import (
    PADDING_TRAITS,
    build,
    combinations,
    other_combinations,
    padding_traits,
    query_combinations,
)
from tests.misfits import CLUSTERED, DENSE, POINTS, SELECTIVE, Misfit, misfits
from tests.tiny_models import (
    padding_mask,
    targets_of,
    total,
    use_unpadded_query_positions,
    with_noise,
)
from tools.write_combinations import DOCUMENT, INTRODUCTION, document

BOXES = [[[0.4, 0.5, 0.3, 0.4], [0.7, 0.6, 0.2, 0.2]], [[0.5, 0.5, 0.9, 0.8]]]


def expected_refusal(combination: Combination) -> list[str]:
    """Class names that the sentence must contain, or none if the combination makes sense."""
    encoder, decoder = combination.encoder, combination.decoder
    if encoder.attention is PyramidEncoder and combination.num_levels == 1:
        return ["SeparateExchange", "levels"]
    if decoder.attention is SpatiallyModulatedAttention and combination.num_levels > 1:
        return ["SpatiallyModulatedAttention", "ChannelMapper"]
    if decoder.attention is ScaleSelectiveModulatedAttention and combination.num_levels == 1:
        return ["ScaleSelectiveModulatedAttention", "ChannelMapper"]
    if encoder.selection is not None and encoder.attention in (IntraScaleAttention, PyramidEncoder):
        return [encoder.attention.__name__, encoder.selection.__name__]
    if encoder.layer is DualAttentionEncoderLayer and not decoder.queries.needs_proposals:
        return ["DualAttentionEncoderLayer", decoder.queries.__name__]
    if decoder.queries is LearnedQueries and decoder.attention.__name__.startswith("Deformable"):
        return ["DeformableDecoderAttention", "LearnedQueries"]
    return []


COMBINATIONS = [
    *combinations(),
    *query_combinations(),
    *itertools.chain.from_iterable(other_combinations().values()),
]
SENSIBLE = [c for c in COMBINATIONS if not expected_refusal(c)]
# Convolutions that see the padding cannot be put aside, as the other traits can.
MASKED = [c for c in SENSIBLE if "convolutions" not in padding_traits(c)]
SENSELESS = [c for c in COMBINATIONS if expected_refusal(c)]


def image_sizes(combination: Combination, *cells: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes in pixels from rows and columns of the coarsest level: 32 pixels, or two of one level.

    Cells are never part image, part padding.
    """
    stride = 32 if combination.num_levels > 1 else 64
    return [(stride * rows, stride * columns) for rows, columns in cells]


def run_training(
    model: EfficientDETR, combination: Combination
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of a padded batch, and all gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    sizes = image_sizes(combination, (2, 3), (1, 2))
    mask = padding_mask(sizes, sizes[0])
    images = torch.randn(2, 3, *sizes[0]).masked_fill(mask[:, None], 0)
    targets = targets_of(*BOXES)
    losses = model.compute_losses(model.detector(images, mask, targets), targets)
    total(losses).backward()
    missing = torch.full((), torch.nan)
    return losses, {
        name: missing if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def without_gradient(combination: Combination) -> set[str]:
    """Names of parameters that have none, with the reason."""
    names = set()
    if combination.decoder.queries is LearnedQueries:
        # Contents start at zero, so the first self-attention has one and the same value for all
        # queries: whatever the weights, it hands on the bias.
        names.add("detector.decoder.layers.0.self_attention.in_proj_weight")
        # A norm of zeros is its bias; in pre-norm layers this one reads the contents.
        if combination.decoder.layer is PreNormDecoderLayer:
            names.add("detector.decoder.layers.0.self_attention_norm.weight")
    return names


@pytest.mark.parametrize("combination", SENSIBLE, ids=str)
def test_trains(combination: Combination) -> None:
    """Every parameter has a gradient, and a second run gives the same bits."""
    model = build(combination)
    losses, gradients = run_training(model, combination)
    assert all(loss.isfinite() for loss in losses.values())
    without = without_gradient(combination)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        if name not in without:
            assert gradient.abs().sum() > 0, name
    again, same_gradients = run_training(model, combination)
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)


def put_aside(traits: list[str], model: EfficientDETR) -> None:
    """Change a model so that padding does not have these published traits."""
    detector: Any = model.detector
    if "scores" in traits:
        with torch.no_grad():
            detector.selection.score_head.hidden[0].weight[:, CHANNELS // 2 :] = 0
            if getattr(detector.selection, "modulation", None) is not None:
                detector.selection.modulation.zero_()
    if "proposals" in traits:
        detector.proposals.register_forward_hook(score_invalid_last)
    if "positions" in traits:
        use_unpadded_query_positions(model, CHANNELS)


def score_invalid_last(head: nn.Module, inputs: Any, proposals: Proposals) -> Proposals:
    return score_invalid(proposals, -1e3)


def score_invalid_first(head: nn.Module, inputs: Any, proposals: Proposals) -> Proposals:
    return score_invalid(proposals, 1e3)


def score_invalid(proposals: Proposals, score: float) -> Proposals:
    invalid = proposals.box_logits.isinf().any(-1, keepdim=True)
    return dataclasses.replace(proposals, logits=proposals.logits.masked_fill(invalid, score))


def largest_difference(model: EfficientDETR, combination: Combination) -> float:
    """Between what is predicted for images in a padded batch, with noise there, and alone."""
    # Images with selected tokens have the same area; see `PADDING_TRAITS`.
    equal_area = combination.encoder.selection is not None
    sizes = image_sizes(combination, (3, 2), (2, 3) if equal_area else (1, 3))
    images = [torch.randn(1, 3, *size) for size in sizes]
    padded = image_sizes(combination, (3, 3))[0]
    batch = 10 * torch.randn(2, 3, *padded)
    for index, image in enumerate(images):
        batch[index, :, : image.shape[2], : image.shape[3]] = image[0]
    model.eval()
    with torch.no_grad():
        together: DetectorOutput = model.detector(batch, padding_mask(sizes, padded))
        difference = 0.0
        for index, (image, size) in enumerate(zip(images, sizes, strict=True)):
            alone = model.detector(image, padding_mask([size], size)).decoder
            for name in ("logits", "boxes"):
                expected, actual = getattr(alone, name), getattr(together.decoder, name)
                change = actual[:, index] - expected[:, 0]
                difference = max(difference, change.abs().max().item())
    return difference


@pytest.mark.parametrize("combination", MASKED, ids=str)
def test_padding(combination: Combination) -> None:
    """An image is detected in a padded batch as alone, but for the traits that are published."""
    model = build(combination)
    put_aside(padding_traits(combination), model)
    assert largest_difference(model, combination) < 1e-4


@pytest.mark.parametrize("trait", PADDING_TRAITS)
def test_each_padding_trait_matters(trait: str) -> None:
    """The counterpart: with one of the traits, padding does change what is detected."""
    combination = next(c for c in SENSIBLE if trait in padding_traits(c) and c.num_levels > 1)
    model = build(combination)
    put_aside([other for other in padding_traits(combination) if other != trait], model)
    if trait == "proposals":
        model.detector.proposals.register_forward_hook(score_invalid_first)
    assert largest_difference(model, combination) > 1e-3


@pytest.mark.parametrize("combination", SENSELESS, ids=str)
def test_a_combination_without_sense_fails_to_build(combination: Combination) -> None:
    with pytest.raises(ConfigError) as error:
        build(combination)
    for name in expected_refusal(combination):
        assert name in str(error.value)
    assert ": " in str(error.value), "no remedy"


@pytest.mark.parametrize("misfit", misfits(), ids=str)
def test_parts_that_do_not_fit_fail_to_build(misfit: Misfit) -> None:
    with pytest.raises(ConfigError) as error:
        instantiate(misfit.config())
    for name in misfit.names:
        assert name in str(error.value)
    assert ": " in str(error.value), "no remedy"


@pytest.mark.parametrize("decoder", [POINTS, DENSE, SELECTIVE], ids=lambda kind: kind.title)
def test_distillation(decoder: DecoderKind) -> None:
    """Clustered attention is taught in front of any decoder whose queries are not selected."""
    model_config = config(Combination(CLUSTERED, decoder, num_levels=3))
    model_config.detector._target_ = DistillationDetector
    model_config.losses.append(L(BoxDistillationLoss)())
    combination = Combination(CLUSTERED, decoder, num_levels=3)
    losses, gradients = run_training(with_noise(instantiate(model_config)), combination)
    assert losses["loss_box_distillation"] > 0
    for name in gradients.keys() - without_gradient(combination):
        assert gradients[name].abs().sum() > 0, name


def test_the_document_is_up_to_date() -> None:
    """`python -m tools.write_combinations` writes it."""
    assert DOCUMENT.read_text() == document()


def test_the_example_of_the_document(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", INTRODUCTION, re.DOTALL)
    assert example is not None
    shutil.copytree(DOCUMENT.parents[1] / "configs", tmp_path / "configs")
    file = tmp_path / "configs" / "own.py"
    file.write_text(example[1])
    detector = instantiate(LazyConfig.load(str(file)).model).detector
    assert {type(layer.attention) for layer in detector.encoder.layers} == {
        ClusteredEncoderAttention
    }
    assert {type(layer.cross_attention) for layer in detector.decoder.layers} == {
        SpatiallyModulatedAttention
    }
