"""Dense attention: by hand, and against torch's own with the same weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention import (
    DenseDecoderAttention,
    DenseEncoderAttention,
    SelfAttention,
)
from efficient_detr.structures import FeatureTokens
from tests.tiny_models import random_tokens, randomised, torch_attention

SHAPES = [(3, 4), (2, 2)]  # 16 tokens
BOTH = pytest.mark.parametrize("family", [DenseEncoderAttention, DenseDecoderAttention])


def generic(channels: int = 8, num_heads: int = 2) -> SelfAttention:
    attention = SelfAttention(channels=channels, num_heads=num_heads)
    randomised(attention, 0.4)
    return attention.eval()


def by_hand(attention: SelfAttention, query: Tensor, position: Tensor, blocked: Tensor) -> Tensor:
    """softmax((q + p) (q + p)^T / sqrt(channels a head)) q, with the module's projections."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    located = query + position
    q, k, v = (
        (x @ w.T + b).unflatten(2, (2, 4)).transpose(1, 2)  # (B, H, Q, D)
        for x, w, b in zip([located, located, query], weights, biases, strict=True)
    )
    scores = (q @ k.transpose(2, 3) / math.sqrt(4)).masked_fill(blocked, -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return attention.out_proj(mixed)


def test_formula() -> None:
    attention = generic()
    query, position = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = by_hand(attention, query, position, torch.zeros(5, 5, dtype=torch.bool))
    torch.testing.assert_close(attention(query, position), expected)


def test_mask_blocks_where_it_is_true() -> None:
    attention = generic()
    query, position = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    blocked = torch.rand(5, 5) < 0.4
    blocked.fill_diagonal_(False)
    output = attention(query, position, blocked)
    torch.testing.assert_close(output, by_hand(attention, query, position, blocked))
    # Row 0 may look at itself only: whatever the others hold.
    blocked[0, 1:] = True
    others = query.clone()
    others[:, 1:] = torch.randn(2, 4, 8)
    torch.testing.assert_close(
        attention(query, position, blocked)[:, 0], attention(others, position, blocked)[:, 0]
    )


def test_initialisation_is_uniform_in_the_xavier_bounds() -> None:
    attention = SelfAttention(channels=32, num_heads=4)
    # The three projections are one matrix (96, 32), and so is their bound: sqrt(6 / 128).
    assert 0.9 < attention.in_proj_weight.abs().max() / math.sqrt(6 / 128) <= 1
    assert 0.9 < attention.out_proj.weight.abs().max() / math.sqrt(6 / 64) <= 1
    assert attention.in_proj_bias.eq(0).all() and attention.out_proj.bias.eq(0).all()


def test_names_and_packed_matrix_are_torchs_own() -> None:
    """Same seed, same packed matrix. The output matrix is Xavier-uniform too, unlike torch's."""
    torch.manual_seed(3)
    attention = SelfAttention(channels=16, num_heads=4)
    torch.manual_seed(3)
    expected = torch.nn.MultiheadAttention(16, 4).state_dict()
    ours = attention.state_dict()
    assert ours.keys() == expected.keys()
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.bias"):
        assert torch.equal(ours[name], expected[name])


def test_self_attention_against_torch() -> None:
    attention = generic()
    query, position = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    blocked = torch.rand(5, 5) < 0.4
    blocked.fill_diagonal_(False)
    located = query + position
    expected, _ = torch_attention(attention)(located, located, query, attn_mask=blocked)
    torch.testing.assert_close(attention(query, position, blocked), expected)


def attend(attention: Any, query: Tensor, position: Tensor, memory: FeatureTokens) -> Tensor:
    """Call either form; neither reads references, nor what stands in for them here."""
    unread = torch.full_like(query, math.nan)
    if isinstance(attention, DenseDecoderAttention):
        return attention(query, position, None, memory, unread)
    return attention(query, position, unread, memory, torch.ones(query.shape[:2]).bool())


@BOTH
def test_attention_to_the_memory_against_torch(family: type) -> None:
    """Positions on queries and keys, not on values; padded tokens are no keys."""
    attention = randomised(family(channels=8, num_heads=2))
    memory = random_tokens(SHAPES, sizes=[(24, 32), (16, 20)])
    assert memory.padding_mask[1].any() and not memory.padding_mask[1].all()
    query, position = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected, _ = torch_attention(attention)(
        query + position,
        memory.features + memory.positions,
        memory.features,
        key_padding_mask=memory.padding_mask,
    )
    torch.testing.assert_close(attend(attention, query, position, memory), expected)


@BOTH
def test_padding_does_not_matter(family: type) -> None:
    """Neither what it holds, nor how much of it there is."""
    attention = randomised(family(channels=8, num_heads=2))
    memory = random_tokens(SHAPES, sizes=[(16, 20)])
    query, position = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    expected = attend(attention, query, position, memory)
    padding = memory.padding_mask.unsqueeze(-1)
    noisy = dataclasses.replace(
        memory,
        features=memory.features.masked_fill(padding, 1e4),
        positions=memory.positions.masked_fill(padding, -1e4),
    )
    torch.testing.assert_close(attend(attention, query, position, noisy), expected)
    rest = (~memory.padding_mask[0]).nonzero().squeeze(1)
    alone = dataclasses.replace(
        memory,
        features=memory.features[:, rest],
        positions=memory.positions[:, rest],
        padding_mask=memory.padding_mask[:, rest],
    )
    torch.testing.assert_close(attend(attention, query, position, alone), expected)


@BOTH
def test_dropout_of_the_attention_weights(family: type) -> None:
    """In training some weights are zero and the others larger; in evaluation none is."""
    attention = family(channels=8, num_heads=2, dropout=0.5)
    memory, query = random_tokens(SHAPES), torch.randn(1, 5, 8)
    first, second = (attend(attention, query, query, memory) for _ in range(2))
    assert not torch.equal(first, second)
    attention.eval()
    first, second = (attend(attention, query, query, memory) for _ in range(2))
    assert torch.equal(first, second)


@BOTH
def test_every_parameter_gets_a_gradient(family: type) -> None:
    attention = randomised(family(channels=8, num_heads=2))
    memory, query = random_tokens(SHAPES), torch.randn(1, 5, 8)
    attend(attention, query, query, memory).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_channels_must_fit_the_heads() -> None:
    with pytest.raises(ConfigError, match="channels=10 is not a multiple of num_heads=4"):
        DenseEncoderAttention(channels=10, num_heads=4)


def test_dense_attention_predicts_no_references() -> None:
    attention = DenseDecoderAttention(channels=8, num_heads=2)
    assert not attention.needs_references and not attention.predicts_references
    assert attention.predict_reference_logits(torch.zeros(1, 2, 8)) is None
    assert not DenseEncoderAttention.attends_whole_levels
