"""Self-attention among object tokens."""

from __future__ import annotations

import torch

from efficient_detr.modeling.attention import ObjectSelfAttention, SelfAttention


def build(num_tokens: int) -> ObjectSelfAttention:
    attention = SelfAttention(channels=8, num_heads=2)
    return ObjectSelfAttention(attention=attention, channels=8, num_tokens=num_tokens)


def test_select_orders_by_score() -> None:
    scores = torch.tensor([[0.1, 0.9, -2.0, 0.5], [3.0, 2.0, 1.0, 4.0]])
    assert build(3).select(scores).tolist() == [[1, 3, 0], [3, 0, 1]]
    assert build(300).select(scores).tolist() == [[1, 3, 0, 2], [3, 0, 1, 2]]


def test_only_object_tokens_change() -> None:
    module = build(2)
    features, positions = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    scores = torch.tensor([[0.0, 5, 1, 4, 2, 3], [9, 0, 1, 2, 3, 8]])
    output = module(features, positions, scores)
    for image, objects in enumerate([[1, 3], [0, 5]]):
        rest = [i for i in range(6) if i not in objects]
        assert torch.equal(output[image, rest], features[image, rest])
        chosen, located = features[image, objects][None], positions[image, objects][None]
        expected = module.norm(chosen + module.attention(chosen, located))
        torch.testing.assert_close(output[image, objects][None], expected)


def test_other_tokens_do_not_influence_object_tokens() -> None:
    module = build(2)
    features, positions = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    scores = torch.tensor([[5.0, 4, 0, 0, 0, 0]])
    changed = features.clone()
    changed[:, 2:] += 1
    assert torch.equal(
        module(features, positions, scores)[:, :2], module(changed, positions, scores)[:, :2]
    )


def test_fewer_tokens_than_wanted() -> None:
    module = build(300)
    features = torch.randn(2, 6, 8)
    output = module(features, torch.zeros_like(features), torch.randn(2, 6))
    assert output.shape == features.shape
    assert (output - features).abs().amax(-1).gt(1e-3).all(), "all tokens took part"


def test_the_ranking_gets_no_gradient_but_the_features_do() -> None:
    module = build(3)
    features = torch.randn(1, 6, 8, requires_grad=True)
    scores = torch.randn(1, 6, requires_grad=True)
    module(features, torch.zeros(1, 6, 8), scores).square().sum().backward()
    assert features.grad is not None and features.grad.abs().sum(-1).gt(0).all()
    assert scores.grad is None


def test_autocast_keeps_the_dtype_of_the_tokens() -> None:
    module = build(3)
    for dtype in (torch.float32, torch.bfloat16):
        features = torch.randn(1, 6, 8).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(features, torch.zeros(1, 6, 8), torch.randn(1, 6))
        assert output.dtype is dtype
