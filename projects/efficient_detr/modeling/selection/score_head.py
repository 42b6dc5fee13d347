"""The network that scores tokens, common to Sparse DETR and Focus-DETR."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efficient_detr.modeling.layers import xavier_linear


class ForegroundScoreHead(nn.Module):
    """Score tokens from their features and the mean of all of them.

    Half of the channels are replaced by their mean over the tokens given (padding included, as
    published), so that a token is judged against its surroundings.

    Args:
        channels: C, a multiple of 4.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.project = xavier_linear(channels, channels)
        self.hidden = nn.ModuleList(
            [xavier_linear(channels, channels // 2), xavier_linear(channels // 2, channels // 4)]
        )
        self.score = xavier_linear(channels // 4, 1)
        self.activation = nn.GELU()

    def forward(self, features: Tensor) -> Tensor:
        """Map tokens (B, N, C), of one level or of all, to foreground logits (B, N)."""
        features = self.activation(self.project(self.norm(features)))
        local, surrounding = features.chunk(2, dim=-1)
        mean = surrounding.mean(dim=1, keepdim=True).expand_as(surrounding)
        features = torch.cat([local, mean], dim=-1)
        for layer in self.hidden:
            features = self.activation(layer(features))
        return self.score(features).squeeze(-1)
