"""Small layers for channels-last feature maps (B, H, W, C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError


class MapConvolution(nn.Conv2d):
    """A convolution of channels-last maps: (B, H, W, C) to (B, H', W', C').

    Permuting a channels-last map gives the memory format of the same name, so nothing is copied.
    Arguments are those of `nn.Conv2d`.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Convolve (B, H, W, C)."""
        return super().forward(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConvolution(MapConvolution):
    """A 3x3 convolution of every channel by itself.

    Args:
        channels: C.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1, groups=channels)


class ResidualDepthwiseConvolution(DepthwiseConvolution):
    """A map plus its depthwise 3x3 convolution.

    DAT++ has it before the attention ("local perception unit") and inside the feed-forward network
    (arXiv 2309.01430, section 4.3).

    Args:
        channels: C.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return features + super().forward(features)


class MapFeedForward(nn.Module):
    """The feed-forward network of a block: linear, mixing, GELU, linear.

    Initialised as PyTorch initialises linear layers, which the published models rely on.

    Args:
        channels: C of input and output.
        hidden_channels: width in between.
        mixing: module on the hidden map (B, H, W, hidden channels) before the activation, None for
            none.
    """

    def __init__(
        self, *, channels: int, hidden_channels: int, mixing: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, hidden_channels)
        self.mixing = mixing
        self.activation = nn.GELU()
        self.contract = nn.Linear(hidden_channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C), without the residual."""
        hidden = self.expand(features)
        if self.mixing is not None:
            hidden = self.mixing(hidden)
        return self.contract(self.activation(hidden))


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a branch for a random part of the images.

    The rest is scaled up, so that the expectation stays (arXiv 1603.09382).

    Args:
        probability: of dropping, in [0, 1).

    Raises:
        ConfigError: if the probability is out of range.
    """

    def __init__(self, *, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ConfigError(
                f"drop_path={probability} of a block: choose a probability of at least 0 and less "
                "than 1."
            )
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """Drop whole images of (B, ...)."""
        if not self.training or self.probability == 0:
            return branch
        keep = 1 - self.probability
        shape = (len(branch),) + (1,) * (branch.dim() - 1)
        return branch * branch.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"probability={self.probability}"


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (arXiv 2103.17239, equation 5).

    Args:
        channels: C.
        initial_value: of every factor.
    """

    def __init__(self, *, channels: int, initial_value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(initial_value)))

    def forward(self, branch: Tensor) -> Tensor:
        """Scale (..., C)."""
        return branch * self.weight
