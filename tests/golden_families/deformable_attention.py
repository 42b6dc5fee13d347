"""Numbers of the published deformable attention: the operator alone, and the module around it."""

from __future__ import annotations

import os
from unittest import mock

import torch
from torch import Tensor

from efficient_detr.modeling.attention import DeformableEncoderAttention
from efficient_detr.ops import library, multi_scale_deformable_attention
from efficient_detr.structures import FeatureTokens, SpatialShapes
from tests.golden_families.fixture import Comparison

# The fixture is in float64; sums may be added up in another order.
EXACT = 1e-12


def compare(comparison: Comparison) -> None:
    """Every implementation of the operator that this machine has."""
    for implementation in ("pytorch", "compiled"):
        if implementation == "pytorch" or not library.missing_reason(torch.device("cpu")):
            with mock.patch.dict(os.environ, {library.ENVIRONMENT_VARIABLE: implementation}):
                for _, (case,) in comparison.matches(r"([^/]*/)value"):
                    compare_operator(comparison, case)
                for _, (case,) in comparison.matches(r"([^/]*/)query"):
                    compare_module(comparison, case)


def compare_operator(comparison: Comparison, case: str) -> None:
    shapes = spatial_shapes(comparison, case)
    names = ["value", "sampling_locations", "attention_weights"]
    leaves = [comparison.expect(case + name).requires_grad_() for name in names]
    output = multi_scale_deformable_attention(leaves[0], shapes, *leaves[1:])
    comparison.close(case + "output", output, EXACT, EXACT)
    gradients = torch.autograd.grad(output, leaves, comparison.expect(case + "grad_output"))
    for name, gradient in zip(names, gradients, strict=True):
        comparison.close(f"{case}grad_{name}", gradient, EXACT, EXACT)
    # The published kernel has another one-sided derivative exactly one pixel outside a level.
    info = comparison.fixture.info["cases"][case.rstrip("/")]
    expected = comparison.expect(case + "grad_sampling_locations_kernel_rule")
    differs = (gradients[1] - expected).abs() > EXACT
    assert differs.nonzero().tolist() == info["locations_grad_differs_at_index_NqMlPxy"]


def compare_module(comparison: Comparison, case: str) -> None:
    shapes = spatial_shapes(comparison, case)
    query = comparison.expect(case + "query").requires_grad_()
    ring = comparison.expect(case + "init_sampling_offsets_bias")
    points = round(ring.abs().max().item())  # the last point of a head is as many cells away
    attention = DeformableEncoderAttention(
        channels=query.shape[-1],
        num_heads=len(ring) // (2 * points * len(shapes)),
        num_levels=len(shapes),
        num_points=points,
    )
    comparison.close(case + "init_sampling_offsets_bias", attention.sampling_offsets.bias, 1e-6)
    attention.double().load_state_dict(
        {
            name: comparison.expect(f"{case}weights/{theirs(name)}")
            for name in attention.state_dict()
        }
    )
    features = comparison.expect(case + "input_flatten").requires_grad_()
    reference = comparison.expect(case + "reference_points")
    memory = tokens(features, comparison.expect(case + "padding_mask"), shapes)
    output = attention.attend(query, reference, memory)
    comparison.close(case + "output", output, EXACT, EXACT)
    output.backward(comparison.expect(case + "grad_output"))
    comparison.close(case + "grad_query", gradient_of(query), EXACT, EXACT)
    comparison.close(case + "grad_input_flatten", gradient_of(features), EXACT, EXACT)
    for name, parameter in attention.named_parameters():
        comparison.close(f"{case}grad_weights/{theirs(name)}", gradient_of(parameter), EXACT, EXACT)


def spatial_shapes(comparison: Comparison, case: str) -> SpatialShapes:
    shapes = comparison.expect(case + "spatial_shapes")
    areas = shapes.prod(1)
    comparison.equal(case + "level_start_index", areas.cumsum(0) - areas)
    return [(height, width) for height, width in shapes.tolist()]


def tokens(features: Tensor, padding_mask: Tensor, shapes: SpatialShapes) -> FeatureTokens:
    """Features and their mask; the attention looks at nothing else."""
    unused = features.new_empty(0)
    return FeatureTokens(features, unused, padding_mask.bool(), shapes, unused, unused, unused)


def theirs(name: str) -> str:
    return name.replace("_projection", "_proj")


def gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    gradient, leaf.grad = leaf.grad, None
    return gradient
