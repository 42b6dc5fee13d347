"""Attention inside every level by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_detr.modeling.attention.dense import DenseEncoderAttention
from efficient_detr.modeling.attention.intra_scale import IntraScaleAttention
from efficient_detr.structures import FeatureTokens
from tests.tiny_models import random_tokens, randomised, torch_attention

C = 8
SHAPES = [(4, 6), (2, 3)]


def attend(attention: IntraScaleAttention, memory: FeatureTokens) -> Tensor:
    active = memory.all_active()
    return attention(
        active.features, active.positions, active.reference_points, memory, active.padding_mask
    )


def test_levels_attend_as_if_alone() -> None:
    """Torch's attention, once for each level, with the same weights."""
    attention = randomised(IntraScaleAttention(channels=C, num_heads=2)).eval()
    reference = torch_attention(attention)
    memory = random_tokens(SHAPES, batch=2, sizes=[(32, 48), (16, 40)])
    located = memory.split(memory.features + memory.positions)
    masks, features = memory.split(memory.padding_mask), memory.split()
    expected = [
        reference(key, key, value, key_padding_mask=mask, need_weights=False)[0]
        for key, value, mask in zip(located, features, masks, strict=True)
    ]
    torch.testing.assert_close(
        attend(attention, memory), torch.cat(expected, dim=1), atol=1e-5, rtol=1e-5
    )


def test_levels_do_not_see_each_other() -> None:
    attention = randomised(IntraScaleAttention(channels=C, num_heads=2)).eval()
    memory = random_tokens(SHAPES)
    before = memory.split(attend(attention, memory))
    changed = memory.features.clone()
    changed[:, :24] = torch.randn(1, 24, C)
    after = memory.split(attend(attention, memory.with_features(changed)))
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[1], before[1], atol=0, rtol=0)


def test_one_level_is_dense_attention() -> None:
    attention = randomised(IntraScaleAttention(channels=C, num_heads=2)).eval()
    dense = DenseEncoderAttention(channels=C, num_heads=2).eval()
    dense.load_state_dict(attention.state_dict())
    memory = random_tokens([(4, 6)], batch=2, sizes=[(32, 48), (16, 40)])
    active = memory.all_active()
    expected = dense(
        active.features, active.positions, active.reference_points, memory, active.padding_mask
    )
    torch.testing.assert_close(attend(attention, memory), expected)


def test_padding_is_not_attended_to() -> None:
    attention = randomised(IntraScaleAttention(channels=C, num_heads=2)).eval()
    memory = random_tokens(SHAPES, sizes=[(16, 32)])
    padding = memory.padding_mask
    before = attend(attention, memory)
    noise = torch.where(padding.unsqueeze(-1), torch.randn_like(memory.features), 0)
    after = attend(attention, memory.with_features(memory.features + 10 * noise))
    assert padding.any() and not padding.all()
    torch.testing.assert_close(after[~padding], before[~padding])


def test_every_parameter_gets_a_gradient() -> None:
    attention = randomised(IntraScaleAttention(channels=C, num_heads=2))
    attend(attention, random_tokens(SHAPES)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in attention.parameters())


def test_a_selection_of_tokens_cannot_attend() -> None:
    assert IntraScaleAttention.attends_whole_levels
