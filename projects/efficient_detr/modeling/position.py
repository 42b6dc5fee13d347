"""Sine position embeddings of feature maps (DETR, appendix A.4) and of boxes (DAB-DETR, 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError


def sine_embedding(values: Tensor, num_features: int, temperature: float) -> Tensor:
    """Interleaved sines and cosines of `values` at geometric wavelengths.

    Args:
        values: (...) angles in radians.
        num_features: size of the embedding, even.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        (..., num_features) in float32 or better: sin at even, cos at odd places, two places a
        wavelength.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    exponents = torch.arange(num_features // 2, dtype=dtype, device=values.device)
    divisors = temperature ** (2 * exponents / num_features)
    angles = values.to(dtype).unsqueeze(-1) / divisors
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class SinePositionEmbedding(nn.Module):
    """Embedding of the row and column of each cell, counted over unpadded cells only.

    Args:
        channels: C of the embedding; the first half encodes y, the second half x.
        temperature: ratio of the longest to the shortest wavelength. The 12-epoch Focus-DETR and
            DINO checkpoints use 10000, the longer schedules 20.
        offset: added to the 1-based row and column count; -0.5 puts it at cell centres.
    """

    def __init__(self, *, channels: int, temperature: float = 10000.0, offset: float = 0.0) -> None:
        super().__init__()
        if channels % 4:
            raise ConfigError(
                f"position embedding channels must be a multiple of 4, not {channels}"
            )
        self.channels = channels
        self.temperature = temperature
        self.offset = offset

    def forward(self, padding_mask: Tensor) -> Tensor:
        """Embed a padding mask (B, H, W), True on padding, as (B, C, H, W) float32."""
        valid = (~padding_mask).float()
        embeddings = []
        for dim in (1, 2):
            count = valid.cumsum(dim)
            last = count.narrow(dim, count.shape[dim] - 1, 1)
            angles = (count + self.offset) / (last + 1e-6) * (2 * math.pi)
            embeddings.append(sine_embedding(angles, self.channels // 2, self.temperature))
        return torch.cat(embeddings, dim=-1).permute(0, 3, 1, 2)


class BoxPositionEmbedding(nn.Module):
    """Embedding of a box: C/2 features for each coordinate, in the order (y, x, w, h).

    Args:
        channels: C of the model; the embedding has 2 C channels.
        temperature: ratio of the longest to the shortest wavelength.
    """

    def __init__(self, *, channels: int, temperature: float = 10000.0) -> None:
        super().__init__()
        self.channels = channels
        self.temperature = temperature

    def forward(self, boxes: Tensor) -> Tensor:
        """Embed boxes (..., 4) as (cx, cy, w, h) in [0, 1] into (..., 2 C), float32 or better."""
        ordered = boxes[..., [1, 0, 2, 3]] * (2 * math.pi)
        return sine_embedding(ordered, self.channels // 2, self.temperature).flatten(-2)
