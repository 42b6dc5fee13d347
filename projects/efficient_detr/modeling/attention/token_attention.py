"""How much attention each token gets from deformable cross-attention.

Sparse DETR trains its token selection on this map of the whole decoder (section 3.3, "decoder
cross-attention map").
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_detr.structures import SpatialShapes


@torch.no_grad()
def token_attention_map(
    sampling_locations: Tensor, attention_weights: Tensor, spatial_shapes: SpatialShapes
) -> Tensor:
    """Hand the weight of every sampling point to the four tokens around it, bilinearly.

    The position of a point is its location times the size of the level, without the half cell that
    lies between a token's index and its centre. The sampling itself does subtract the half cell;
    the published map does not, and the published weights were trained with it.

    What falls outside a level is dropped. Nothing here has a gradient.

    Args:
        sampling_locations: (B, Q, H, L, P, 2) points (x, y); [0, 1] is the extent of a level.
        attention_weights: (B, Q, H, L, P).
        spatial_shapes: (H_l, W_l) of each level.

    Returns:
        (B, H, S) float32 attention of each token, summed over queries and points.
    """
    device = sampling_locations.device
    heights, widths = torch.tensor(spatial_shapes, device=device).unbind(1)
    areas = heights * widths
    starts = (areas.cumsum(0) - areas)[:, None]  # (L, 1), as the next two
    heights, widths = heights[:, None], widths[:, None]
    x, y = sampling_locations.float().unbind(-1)  # (B, Q, H, L, P)
    x, y = x * widths, y * heights
    left, top = x.floor(), y.floor()
    batch, _, num_heads = attention_weights.shape[:3]
    num_tokens = sum(height * width for height, width in spatial_shapes)
    maps = torch.zeros(batch, num_heads, num_tokens, device=device)
    for column, horizontal in ((left, left + 1 - x), (left + 1, x - left)):
        for row, vertical in ((top, top + 1 - y), (top + 1, y - top)):
            inside = (column >= 0) & (column < widths) & (row >= 0) & (row < heights)
            index = (starts + row * widths + column).where(inside, 0).long()
            weight = (attention_weights.float() * horizontal * vertical).where(inside, 0)
            maps.scatter_add_(2, _by_head(index), _by_head(weight))
    return maps


def _by_head(samples: Tensor) -> Tensor:
    """(B, Q, H, L, P) -> (B, H, Q L P)."""
    return samples.transpose(1, 2).flatten(2)
