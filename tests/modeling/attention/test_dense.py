"""Dense self-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from efficient_detr.modeling.attention import SelfAttention


def generic(channels: int = 8, num_heads: int = 2) -> SelfAttention:
    attention = SelfAttention(channels=channels, num_heads=num_heads)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention.eval()


def by_hand(attention: SelfAttention, query: Tensor, position: Tensor, blocked: Tensor) -> Tensor:
    """softmax((q + p) (q + p)^T / sqrt(channels a head)) q, with the module's projections."""
    inner = attention.attention
    weights, biases = inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3)
    located = query + position
    q, k, v = (
        (x @ w.T + b).unflatten(2, (2, 4)).transpose(1, 2)  # (B, H, Q, D)
        for x, w, b in zip([located, located, query], weights, biases, strict=True)
    )
    scores = (q @ k.transpose(2, 3) / math.sqrt(4)).masked_fill(blocked, -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return inner.out_proj(mixed)


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
    attention = SelfAttention(channels=32, num_heads=4).attention
    # The three projections are one matrix (96, 32), and so is their bound: sqrt(6 / 128).
    assert 0.9 < attention.in_proj_weight.abs().max() / math.sqrt(6 / 128) <= 1
    assert 0.9 < attention.out_proj.weight.abs().max() / math.sqrt(6 / 64) <= 1
    assert attention.in_proj_bias.eq(0).all() and attention.out_proj.bias.eq(0).all()
