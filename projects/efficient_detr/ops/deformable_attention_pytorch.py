"""Multi-scale deformable attention written with PyTorch's own operators; always there.

Two formulations with equal results: `sample_by_grid_sample` is the plain definition and the form
that exports, `sample_by_embedding_bag` is faster on a CPU. Both are differentiable once, on every
device, and never call the project's compiled operators.

Shape letters: B images, S tokens over all levels, Q queries, H heads, D channels a head, L levels,
P points.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from efficient_detr.ops.contexts import needs_pytorch

# The backward of embedding_bag sorts its rows, which pays for wide heads only. Measured on one core
# against grid_sample, forward and backward, S = Q = 5600: D 64 four times as fast, D 32 1.3 times
# (1.2 at S = Q = 22223, 1.6 with 900 queries), D 16 0.8 times. Without gradients the bag is faster
# for every D measured: 1.3 times at D 8, 3.5 times and more at D 32.
_NARROWEST_HEAD_OF_BAG_WITH_GRADIENT = 32


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what locations are read and sums are kept: float64 for float64 values, else float32."""
    return torch.promote_types(dtype, torch.float32)


def attend(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The operator, in the faster formulation; see `ops.multi_scale_deformable_attention`."""
    tensors = (value, sampling_locations, attention_weights)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if _is_bag_faster(value, needs_gradient):
        sample = sample_by_embedding_bag
    else:
        sample = sample_by_grid_sample
    dtype = real_dtype(value.dtype)
    output = sample(
        value.to(dtype), spatial_shapes, sampling_locations.to(dtype), attention_weights.to(dtype)
    )
    return output.to(value.dtype)


def attend_fused(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """The fused operator, step by step; see `ops.fused_multi_scale_deformable_attention`."""
    dtype = real_dtype(value.dtype)
    locations = deformable_sampling_locations(
        reference.to(dtype), sampling_offsets.to(dtype), spatial_shapes
    )
    weights = softmax_over_points(attention_logits.to(dtype))
    return attend(value, spatial_shapes, locations, weights)


def deformable_sampling_locations(
    reference: Tensor, sampling_offsets: Tensor, spatial_shapes: list[tuple[int, int]]
) -> Tensor:
    """Where queries sample (Deformable DETR, section 4.1 and appendix A.4).

    Around a reference point, offsets count in cells of the level: (x, y) + offset / (W_l, H_l).
    In a reference box, they count in 1/P of half its size: (cx, cy) + offset / P * (w, h) / 2.

    Args:
        reference: (B, Q, L, 2) points (x, y) or (B, Q, L, 4) boxes (cx, cy, w, h), normalised to
            each level.
        sampling_offsets: (B, Q, H, L, P, 2).
        spatial_shapes: (H_l, W_l) of each level.

    Returns:
        (B, Q, H, L, P, 2) points (x, y) in float32 or better; NaN, which is no place, where the
        offset or a number of the reference is not finite.
    """
    dtype = real_dtype(torch.promote_types(reference.dtype, sampling_offsets.dtype))
    reference, offsets = reference.to(dtype)[:, :, None, :, None], sampling_offsets.to(dtype)
    # Numbers that are not finite leave before the arithmetic: in its backward, they would turn
    # gradients of zero into NaN.
    is_place = reference.isfinite().all(-1, keepdim=True) & offsets.isfinite()
    reference = reference.masked_fill(~reference.isfinite(), 0)  # (B, Q, 1, L, 1, 2 | 4)
    offsets = offsets.masked_fill(~is_place, 0)
    if reference.shape[-1] == 2:
        locations = reference + offsets / _level_sizes(spatial_shapes, offsets)
    else:
        points = offsets.shape[-2]
        locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    return locations.masked_fill(~is_place, math.nan)


def _level_sizes(spatial_shapes: list[tuple[int, int]], like: Tensor) -> Tensor:
    """(L, 1, 2) width and height of each level.

    They are filled in one by one, because a tensor copied from the host would make a GPU wait and
    cannot be traced by decompositions.
    """
    sizes = [
        like.new_full((), size) for height, width in spatial_shapes for size in (width, height)
    ]
    return torch.stack(sizes).reshape(-1, 1, 2)


def softmax_over_points(attention_logits: Tensor) -> Tensor:
    """Softmax over levels and points together; (B, Q, H, L, P) to (B, Q, H, L, P)."""
    return attention_logits.flatten(-2).softmax(-1).reshape(attention_logits.shape)


def _is_bag_faster(value: Tensor, needs_gradient: bool) -> bool:
    """GPUs have a fast grid_sample, and exports and transforms need the form that all know."""
    if value.device.type != "cpu" or torch.compiler.is_exporting() or needs_pytorch():
        return False
    return not needs_gradient or value.shape[-1] >= _NARROWEST_HEAD_OF_BAG_WITH_GRADIENT


def sample_by_grid_sample(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The operator by one `grid_sample` a level: the plain definition, and the form that exports.

    Arguments and result as in `attend`, one floating dtype throughout.
    """
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    # grid_sample spreads NaN and converts huge numbers to integers, which is undefined. Two sizes
    # outside, where every level is zero, is as far as a point needs to go.
    locations = sampling_locations.nan_to_num(nan=-2.0).clamp(-2.0, 3.0)
    grids = (2 * locations - 1).permute(0, 2, 1, 3, 4, 5).flatten(0, 1)  # (BH, Q, L, P, 2)
    weights = attention_weights.permute(0, 2, 1, 3, 4).flatten(0, 1)  # (BH, Q, L, P)
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)  # (BH, D, S)
    output = value.new_zeros(batch * heads, channels, queries)
    sizes = [height * width for height, width in spatial_shapes]
    for level, feature_map in enumerate(maps.split(sizes, dim=2)):
        sampled = F.grid_sample(
            feature_map.unflatten(2, spatial_shapes[level]),
            grids[:, :, level],
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )  # (BH, D, Q, P)
        output = output + (sampled * weights[:, None, :, level]).sum(-1)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def sample_by_embedding_bag(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The operator as one weighted bag of 4 L P rows of `value` for each query and head.

    Far smaller in memory than `sample_by_grid_sample`: nothing of shape (B, Q, H, L, P, D) exists.
    Arguments and result as there.
    """
    batch, tokens, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    # 32-bit rows are faster to make and to read.
    integer = torch.int32 if batch * tokens * heads < 2**31 else torch.int64
    shapes = torch.tensor(spatial_shapes, dtype=integer, device=value.device)
    heights, widths = shapes.unsqueeze(-1).unbind(1)  # (L, 1)
    x = _neighbours(sampling_locations[..., 0], widths)
    y = _neighbours(sampling_locations[..., 1], heights)
    areas = heights * widths
    images = torch.arange(batch, dtype=integer, device=value.device)[:, None, None, None, None]
    starts = (areas.cumsum(0) - areas).to(integer) + images * tokens  # (B, 1, 1, L, 1)
    rows = _corner_rows(x, y, widths, starts, heads)  # (B, Q, H, L, P, 4)
    weights = _corner_weights(x, y) * attention_weights.unsqueeze(-1)
    output = F.embedding_bag(
        rows.flatten(0, 2).flatten(1),
        value.reshape(batch * tokens * heads, channels),
        per_sample_weights=weights.flatten(0, 2).flatten(1),
        mode="sum",
    )
    return output.reshape(batch, queries, heads * channels)


class _Neighbours(NamedTuple):
    """Along one axis, the two pixels around each point and their shares of the sample.

    All are (B, Q, H, L, P). An outside pixel has share 0 and the index of some pixel inside.
    """

    low: Tensor
    high: Tensor
    share_low: Tensor
    share_high: Tensor


def _neighbours(locations: Tensor, sizes: Tensor) -> _Neighbours:
    """From locations (B, Q, H, L, P), the level spanning [0, 1], and the (L, 1) sizes of levels."""
    pixels = locations * sizes - 0.5
    # -2 has no neighbour inside: it stands for all that is far outside, and for NaN.
    pixels = torch.where((pixels >= -1) & (pixels < sizes), pixels, -2.0)
    low = pixels.detach().floor()
    fraction = pixels - low
    index = low.to(sizes.dtype)
    return _Neighbours(
        low=index.clamp_min(0),
        high=(index + 1).clamp_min(0).minimum(sizes - 1),
        share_low=(1 - fraction).masked_fill(low < 0, 0),
        share_high=fraction.masked_fill((low < -1) | (low >= sizes - 1), 0),
    )


def _corner_rows(
    x: _Neighbours, y: _Neighbours, widths: Tensor, starts: Tensor, heads: int
) -> Tensor:
    """(B, Q, H, L, P, 4) rows of the (B * S * H, D) values at the four corners of each point."""
    head = torch.arange(heads, device=widths.device, dtype=widths.dtype)[:, None, None]
    first = starts * heads + head  # (B, 1, H, L, 1)
    top, bottom = (first + row * (widths * heads) for row in (y.low, y.high))
    left, right = x.low * heads, x.high * heads
    return torch.stack([top + left, top + right, bottom + left, bottom + right], dim=-1)


def _corner_weights(x: _Neighbours, y: _Neighbours) -> Tensor:
    """(B, Q, H, L, P, 4) bilinear weights of the corners, in the order of `_corner_rows`."""
    top = [y.share_low * x.share_low, y.share_low * x.share_high]
    bottom = [y.share_high * x.share_low, y.share_high * x.share_high]
    return torch.stack([*top, *bottom], dim=-1)
