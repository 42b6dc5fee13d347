"""Small building blocks of the transformer: feed-forward network and multi-layer perceptron."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weight and torch's default bias.

    The DETR family initialises every matrix of the transformer so, but leaves linear biases alone.
    """
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    return linear


class FeedForward(nn.Module):
    """The position-wise network of a transformer layer: linear, activation, linear.

    Args:
        channels: C of input and output.
        hidden_channels: width in between.
        dropout: probability after the activation.
        activation: element by element; None for ReLU, which all published models have.
    """

    def __init__(
        self,
        *,
        channels: int,
        hidden_channels: int,
        dropout: float = 0.0,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.expand = xavier_linear(channels, hidden_channels)
        self.contract = xavier_linear(hidden_channels, channels)
        self.activation = nn.ReLU() if activation is None else activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., C) to features (..., C), without the residual."""
        return self.contract(self.dropout(self.activation(self.expand(features))))


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        sizes: channels of the input, of each hidden layer and of the output.
    """

    def __init__(self, *, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(sizes[:-1], sizes[1:], strict=True)
        )

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return cast(nn.Linear, self.layers[-1])

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., sizes[0]) to (..., sizes[-1])."""
        for layer in self.layers[:-1]:
            features = layer(features).relu()
        return self.output(features)
