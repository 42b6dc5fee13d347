"""A convolution with its norm, and the base of the blocks that backbones are built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .batch_norm import FrozenBatchNorm2d


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` followed by an optional ``norm`` module and an optional ``activation``."""

    def __init__(
        self,
        *args: Any,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        output = super().forward(input)
        if self.norm is not None:
            output = self.norm(output)
        return output if self.activation is None else self.activation(output)


class CNNBlockBase(nn.Module):
    """A module from (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self) -> CNNBlockBase:
        """Stop gradients to all parameters and freeze all batch norms; returns the block."""
        self.requires_grad_(False)
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self
