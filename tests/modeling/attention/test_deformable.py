"""Deformable attention of encoder and decoder: where it looks, what it adds up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention import (
    DeformableDecoderAttention,
    DeformableEncoderAttention,
)
from efficient_detr.ops import library
from efficient_detr.ops.deformable_attention_pytorch import sample_by_grid_sample
from efficient_detr.structures import FeatureTokens
from tests.tiny_models import random_tokens, randomised

SHAPES = [(4, 6), (2, 3)]
NO_KERNELS = library.missing_reason(torch.device("cpu"))


def attend(
    attention: Any, query: Tensor, position: Tensor, reference: Tensor, tokens: FeatureTokens
) -> Tensor:
    """Call either form with a fifth argument that deformable attention does not read."""
    if isinstance(attention, DeformableDecoderAttention):
        return attention(query, position, reference, tokens, torch.full_like(query, math.nan))
    return attention(query, position, reference, tokens, torch.ones(query.shape[:2]).bool())


def test_initial_offsets_form_a_ring() -> None:
    """Eight heads look along the eight compass points; point p is p + 1 cells away on that ray.

    The direction (cos, sin) is divided by its larger component, so diagonals are (1, 1), not
    (0.7, 0.7).
    """
    attention = DeformableEncoderAttention(channels=16, num_heads=8, num_levels=2, num_points=4)
    offsets = attention.sampling_offsets.bias.reshape(8, 2, 4, 2)
    compass = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (x, y) in enumerate(compass):
        for point in range(4):
            expected = torch.tensor([[x, y]] * 2) * (point + 1.0)
            torch.testing.assert_close(offsets[head, :, point], expected, atol=1e-5, rtol=0)
    for zeroed in (
        attention.sampling_offsets.weight,
        attention.attention_weights.weight,
        attention.attention_weights.bias,
        attention.value_projection.bias,
        attention.output_projection.bias,
    ):
        assert zeroed.eq(0).all()


def test_offsets_around_a_point_count_in_cells() -> None:
    """One head to the right, two points: reference + (1 or 2 cells) / width of the level."""
    attention = DeformableEncoderAttention(channels=4, num_heads=1, num_levels=2, num_points=2)
    tokens = random_tokens(SHAPES, channels=4)
    reference = torch.tensor([0.5, 0.25]).expand(1, 1, 2, 2)
    locations = attention.sampling_locations(torch.randn(1, 1, 4), reference, tokens)
    assert locations.shape == (1, 1, 1, 2, 2, 2)
    expected = [
        [[0.5 + 1 / 6, 0.25], [0.5 + 2 / 6, 0.25]],
        [[0.5 + 1 / 3, 0.25], [0.5 + 2 / 3, 0.25]],
    ]
    torch.testing.assert_close(locations[0, 0, 0], torch.tensor(expected))


def test_offsets_in_a_box_count_in_its_half_sizes() -> None:
    """Of two points to the right, the first is half way to the border of the box, the second on it.

    offset / P * size / 2: 1/2 * 0.4/2 = 0.1 and 2/2 * 0.4/2 = 0.2, on every level.
    """
    attention = DeformableDecoderAttention(channels=4, num_heads=1, num_levels=2, num_points=2)
    tokens = random_tokens(SHAPES, channels=4)
    reference = torch.tensor([0.5, 0.25, 0.4, 0.1]).expand(1, 1, 2, 4)
    locations = attention.sampling_locations(torch.randn(1, 1, 4), reference, tokens)
    expected = torch.tensor([[0.6, 0.25], [0.7, 0.25]]).expand(2, 2, 2)
    torch.testing.assert_close(locations[0, 0, 0], expected)


def test_encoder_attention_formula() -> None:
    attention = DeformableEncoderAttention(channels=8, num_heads=2, num_levels=2, num_points=3)
    randomised(attention)
    tokens = random_tokens(SHAPES, batch=2)
    query, position = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    reference = torch.rand(2, 5, 2, 2)
    located = query + position
    offsets = attention.sampling_offsets(located).reshape(2, 5, 2, 2, 3, 2)
    sizes = torch.tensor([[6.0, 4.0], [3.0, 2.0]])[:, None]  # (L, 1, 2)
    weights = attention.attention_weights(located).reshape(2, 5, 2, 6).softmax(-1)
    sampled = sample_by_grid_sample(
        attention.value_projection(tokens.features).reshape(2, 30, 2, 4),
        SHAPES,
        reference[:, :, None, :, None] + offsets / sizes,
        weights.reshape(2, 5, 2, 2, 3),
    )
    output = attend(attention, query, position, reference, tokens)
    torch.testing.assert_close(output, attention.output_projection(sampled))


def test_decoder_attention_scales_boxes_by_the_valid_ratios() -> None:
    """A box of the unpadded image becomes a box of each padded level."""
    attention = DeformableDecoderAttention(channels=8, num_heads=2, num_levels=2, num_points=3)
    tokens = random_tokens(SHAPES, sizes=[(16, 24), (32, 48)])
    seen = []
    original = attention.attend

    def spy(query: Tensor, reference: Tensor, memory: object) -> Tensor:
        seen.append(reference)
        return original(query, reference, tokens)

    attention.attend = spy  # type: ignore[method-assign]
    boxes = torch.rand(2, 3, 4)
    attend(attention, torch.randn(2, 3, 8), torch.randn(2, 3, 8), boxes, tokens)
    # 16 of 32 rows and 24 of 48 columns are image on level 0, one of two rows on level 1, and
    # columns 0 and 1 of three (pixels 0 and 16; the third cell is pixel 32).
    ratios = torch.tensor([[[0.5, 0.5], [2 / 3, 0.5]], [[1.0, 1], [1, 1]]]).repeat(1, 1, 2)
    torch.testing.assert_close(seen[0], boxes[:, :, None] * ratios[:, None])


@pytest.mark.parametrize("family", [DeformableEncoderAttention, DeformableDecoderAttention])
def test_padding_contributes_nothing(family: type) -> None:
    """Neither its features nor the bias of the value projection."""
    attention = family(channels=8, num_heads=2, num_levels=2, num_points=2)
    torch.nn.init.ones_(attention.value_projection.bias)
    tokens = random_tokens(SHAPES, sizes=[(16, 24)])
    query, position = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    reference = (
        torch.rand(1, 4, 4) if family is DeformableDecoderAttention else torch.rand(1, 4, 2, 2)
    )
    expected = attend(attention, query, position, reference, tokens)
    changed = tokens.features.masked_fill(tokens.padding_mask.unsqueeze(-1), 1e6)
    output = attend(attention, query, position, reference, tokens.with_features(changed))
    torch.testing.assert_close(output, expected)
    # A box whose points all lie on padding: nothing but the (zero) bias of the output.
    if family is DeformableDecoderAttention:
        outside = torch.tensor([1.8, 1.8, 0.01, 0.01]).expand(1, 4, 4)
        assert attend(attention, query, position, outside, tokens).eq(0).all()


def test_weights_start_equal() -> None:
    """On a constant map, away from the border, the sum of equal weights gives the constant."""
    attention = DeformableEncoderAttention(channels=4, num_heads=2, num_levels=1, num_points=2)
    torch.nn.init.eye_(attention.value_projection.weight)
    torch.nn.init.eye_(attention.output_projection.weight)
    tokens = random_tokens([(9, 9)], channels=4)
    constant = tokens.with_features(torch.tensor([1.0, 2, 3, 4]).expand(1, 81, 4))
    center = torch.full((1, 1, 1, 2), 0.5)
    output = attend(attention, torch.randn(1, 1, 4), torch.randn(1, 1, 4), center, constant)
    torch.testing.assert_close(output[0, 0], torch.tensor([1.0, 2, 3, 4]))


def test_locations_stay_in_float32_under_autocast() -> None:
    """A bfloat16 location has steps of 1/256: two cells of a map of 500 columns."""
    attention = DeformableEncoderAttention(channels=8, num_heads=2, num_levels=1, num_points=2)
    tokens = random_tokens([(2, 500)])
    reference = torch.full((1, 1, 1, 2), 0.7003)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        locations = attention.sampling_locations(torch.randn(1, 1, 8), reference, tokens)
        output = attend(attention, torch.randn(1, 1, 8), torch.randn(1, 1, 8), reference, tokens)
    assert locations.dtype is torch.float32
    torch.testing.assert_close(locations[0, 0, 0, 0, 0, 0].item(), 0.7003 + 1 / 500)
    assert output.isfinite().all()


def test_channels_must_fit_the_heads() -> None:
    with pytest.raises(ValueError, match="channels=10 is not a multiple of num_heads=4"):
        DeformableEncoderAttention(channels=10, num_heads=4)


def test_every_parameter_gets_a_gradient() -> None:
    attention = DeformableEncoderAttention(channels=8, num_heads=2, num_levels=2, num_points=2)
    tokens = random_tokens(SHAPES)
    active = tokens.all_active()
    output = attend(attention, active.features, active.positions, active.reference_points, tokens)
    output.square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert math.isfinite(output.sum().item())


@pytest.mark.skipif(bool(NO_KERNELS), reason=f"needs the compiled kernels, but {NO_KERNELS}")
@pytest.mark.parametrize("family", [DeformableEncoderAttention, DeformableDecoderAttention])
@pytest.mark.parametrize("autocast", [False, True])
def test_same_with_and_without_kernels(
    family: type, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and all gradients, of the references too; under autocast values are bfloat16."""
    attention = family(channels=16, num_heads=2, num_levels=2, num_points=4)
    randomised(attention)
    tokens = random_tokens(SHAPES, batch=2, channels=16, sizes=[(32, 48), (20, 48)])
    decoder = family is DeformableDecoderAttention
    reference = torch.rand(2, 5, 4) if decoder else torch.rand(2, 5, 2, 2)
    inputs = [torch.randn(2, 5, 16), torch.randn(2, 5, 16), reference]
    upstream = torch.randn(2, 5, 16)
    results = []
    for implementation in ("pytorch", "compiled"):
        monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, implementation)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = attend(attention, *leaves, tokens)
        everything = [*leaves, *attention.parameters()]
        grads = torch.autograd.grad(output, everything, upstream.to(output.dtype))
        results.append([output, *grads])
    # bfloat16 resolves 1 to 1/128; where the two round differently, later sums follow.
    tolerance = 0.05 if autocast else 1e-4
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype is expected.dtype
        scale = max(1.0, expected.abs().max().item())
        assert (ours - expected).abs().max() <= tolerance * scale


def test_decoder_attention_scales_points_by_the_valid_ratios() -> None:
    """Half the rows and two thirds of the columns of a level are image: so lies the point."""
    attention = DeformableDecoderAttention(channels=8, num_heads=2, num_levels=2, num_points=1)
    torch.nn.init.zeros_(attention.sampling_offsets.bias)
    tokens = random_tokens(SHAPES, sizes=[(16, 24), (32, 48)])
    points = torch.tensor([[[0.6, 0.8]], [[0.6, 0.8]]])
    query = torch.randn(2, 1, 8)
    locations, weights = attention.sampling(query, query, points, tokens)
    assert locations.shape == (2, 1, 2, 2, 1, 2)
    expected = torch.tensor([[[0.3, 0.4], [0.4, 0.4]], [[0.6, 0.8], [0.6, 0.8]]])
    torch.testing.assert_close(locations[:, 0, 0, :, 0], expected)
    torch.testing.assert_close(weights, torch.full((2, 1, 2, 2, 1), 0.5))


@pytest.mark.parametrize("size", [2, 4])
def test_sampling_is_what_the_attention_does(size: int) -> None:
    """Locations and weights, put through the plain operator, give the attention's output."""
    attention = DeformableDecoderAttention(channels=8, num_heads=2, num_levels=2, num_points=3)
    randomised(attention)
    tokens = random_tokens(SHAPES, batch=2)
    query, position = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    references = torch.rand(2, 5, size)
    locations, weights = attention.sampling(query, position, references, tokens)
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, 5, 2))
    values = attention.value_projection(tokens.features).unflatten(2, (2, 4))
    sampled = sample_by_grid_sample(values, SHAPES, locations, weights)
    output = attend(attention, query, position, references, tokens)
    torch.testing.assert_close(output, attention.output_projection(sampled))


def test_token_attention_adds_up_to_queries_times_heads() -> None:
    """All sampling points lie inside, so nothing of 5 queries with 2 heads is lost."""
    attention = DeformableDecoderAttention(channels=8, num_heads=2, num_levels=2, num_points=3)
    torch.nn.init.zeros_(attention.sampling_offsets.bias)
    tokens = random_tokens(SHAPES, batch=2)
    query = torch.randn(2, 5, 8)
    # Up to half a cell from the last row and column, where the published map drops a part.
    points = torch.rand(2, 5, 2) * 0.45
    attended = attention.token_attention(query, query, points, tokens)
    assert attended.shape == (2, 30) and not attended.requires_grad
    torch.testing.assert_close(attended.sum(1), torch.full((2,), 10.0))


def test_deformable_attention_needs_references() -> None:
    attention: Any = DeformableDecoderAttention(channels=8, num_heads=2, num_levels=2)
    assert attention.needs_references
    query = torch.zeros(1, 2, 8)
    with pytest.raises(ConfigError, match=r"DeformableDecoderAttention needs reference boxes or"):
        attention(query, query, None, random_tokens(SHAPES), query)
