"""Feed-forward network and multi-layer perceptron."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from efficient_detr.modeling.layers import MLP, FeedForward, xavier_linear


def test_xavier_linear_bounds() -> None:
    """Xavier-uniform: within sqrt(6 / (in + out)), here sqrt(6 / 300), with its variance."""
    weight = xavier_linear(100, 200).weight
    bound = math.sqrt(6 / 300)
    assert weight.shape == (200, 100)
    assert weight.abs().max() <= bound
    assert abs(weight.var().item() / (bound**2 / 3) - 1) < 0.05


def test_feed_forward_formula() -> None:
    network = FeedForward(channels=3, hidden_channels=5)
    x = torch.randn(2, 4, 3)
    hidden = (x @ network.expand.weight.T + network.expand.bias).clamp(min=0)
    expected = hidden @ network.contract.weight.T + network.contract.bias
    torch.testing.assert_close(network(x), expected)


def test_feed_forward_with_another_activation() -> None:
    network = FeedForward(channels=3, hidden_channels=5, activation=nn.Tanh())
    x = torch.randn(2, 4, 3)
    expected = network.contract(network.expand(x).tanh())
    torch.testing.assert_close(network(x), expected)


def test_feed_forward_dropout_is_off_in_evaluation() -> None:
    network = FeedForward(channels=3, hidden_channels=64, dropout=0.5)
    x = torch.randn(4, 3)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_mlp_has_no_activation_after_the_last_layer() -> None:
    """Hand-made weights: relu(-2) = 0, relu(3) = 3, then -1 * 3 + 0.5 = -2.5."""
    mlp: Any = MLP(sizes=[1, 2, 1])
    with torch.no_grad():
        mlp.layers[0].weight.copy_(torch.tensor([[-2.0], [3.0]]))
        mlp.layers[0].bias.zero_()
        mlp.layers[1].weight.copy_(torch.tensor([[7.0, -1.0]]))
        mlp.layers[1].bias.fill_(0.5)
    assert mlp(torch.ones(1, 1)).item() == -2.5


def test_mlp_sizes() -> None:
    mlp: Any = MLP(sizes=[4, 6, 2, 3])
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(6, 4), (2, 6), (3, 2)]
    assert mlp(torch.randn(5, 7, 4)).shape == (5, 7, 3)
