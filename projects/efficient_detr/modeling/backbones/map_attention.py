"""The interface of attention inside a backbone, where tokens are the cells of one map."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class MapAttention(nn.Module, ABC):
    """Attention from every cell of a feature map to cells of the same map.

    Maps are channels-last, (B, H, W, C), so that norms and linear layers need no transposition. A
    map of any size is taken; what does not fit its windows an attention pads by itself.
    """

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Attend.

        Args:
            features: (B, H, W, C) normalised features of the block.

        Returns:
            (B, H, W, C) after the output projection, without the residual.
        """
