"""How much of a deformable attention layer of DAT (Xia et al. 2022) its sampling takes.

The layer of the third stage of DAT-T on an image of 800 x 1280 pixels: a 50 x 80 map of 384
channels, 12 heads in 3 groups, as many keys as queries. Each group deforms its own grid of keys:
one bilinear sample a key, `align_corners=True`. The layer's bias for relative positions is a second
sampling, of a small table at the displacement of every query from every key.

B = 1 image; G groups; H x W map; K keys; C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from kernel_benchmark.case import COMPILED, Case, Comparison, Contender, Plan, byte_count
from torch import Tensor

from efficient_detr.ops import library, multi_scale_deformable_attention

GRID_SAMPLE = "grid_sample"
EMBEDDING_BAG = "embedding_bag"
BIAS = "sampling of the position bias"
LAYER = "whole layer"

_OFFSET_RANGE = 2.0
_TABLE_SIDE = 27  # 2 * 14 - 1, for the 14 x 14 map of an image of 224 x 224 pixels
_QUERIES_AT_ONCE = 400
_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Layer:
    """Inputs and weights.

    Attributes:
        x: (1, C, H, W) map.
        positions: (G, H, W, 2) places (x, y) of the keys, -1 and 1 at the centres of the outermost
            pixels.
        projections: (4, C, C) weights for queries, keys, values and output.
        depthwise: (C / G, 1, 5, 5) first weight of the offset network.
        pointwise: (2, C / G, 1, 1) its last weight.
        table: (G, heads / G, 27, 27) biases by displacement.
        heads: of the attention.
    """

    x: Tensor
    positions: Tensor
    projections: Tensor
    depthwise: Tensor
    pointwise: Tensor
    table: Tensor
    heads: int

    @property
    def grouped(self) -> Tensor:
        """(G, C / G, H, W) view of the map."""
        groups = self.table.shape[0]
        return self.x.view(groups, -1, *self.x.shape[2:])


def plan_dat(device: torch.device, *, small: bool) -> Iterator[Plan]:
    """The one case."""
    yield Plan(
        "DAT-T, third stage, one layer, forward",
        (
            Comparison("dat_sampling", GRID_SAMPLE, (LAYER,), is_part=True),
            Comparison("dat_position_bias", BIAS, (LAYER,), is_part=True),
            Comparison("dat_sampling_by_attention_kernel", COMPILED, (GRID_SAMPLE,)),
        ),
        partial(build_dat, device, small=small),
    )


def build_dat(device: torch.device, *, small: bool) -> Case:
    """Draws a layer and gathers what is timed."""
    layer = make_layer(device, *((5, 8, 48, 2) if small else (50, 80, 384, 12)))
    sampler = partial(multi_scale_deformable_attention, implementation="pytorch")
    contenders = {
        GRID_SAMPLE: _sampling(partial(sample_keys, layer.grouped, layer.positions)),
        EMBEDDING_BAG: _sampling(partial(sample_by_attention, sampler, layer)),
        BIAS: Contender(torch.no_grad()(partial(sample_all_biases, layer)), None),
        LAYER: Contender(torch.no_grad()(partial(attend, layer)), None),
    }
    reason = library.missing_reason(device)
    if not reason:
        compiled = partial(multi_scale_deformable_attention, implementation="compiled")
        contenders[COMPILED] = _sampling(partial(sample_by_attention, compiled, layer))
    return Case(
        contenders=contenders,
        exact=lambda: [sample_keys(layer.grouped.double(), layer.positions.double())],
        tolerance=_TOLERANCE,
        compulsory_bytes=2 * byte_count(layer.x) + byte_count(layer.positions),
        missing={COMPILED: reason} if reason else {},
    )


def _sampling(run: partial[Tensor]) -> Contender:
    timed = torch.no_grad()(run)
    return Contender(timed, lambda: [timed()])


def make_layer(device: torch.device, height: int, width: int, channels: int, heads: int) -> Layer:
    """A layer with random weights, four heads a group, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device)

    groups = max(heads // 4, 1)
    width_of_group = channels // groups
    offsets = draw(groups, height, width, 2).tanh() * _OFFSET_RANGE
    return Layer(
        x=draw(1, channels, height, width),
        positions=_grid(height, width, device) + offsets / _sizes(height, width, device),
        projections=draw(4, channels, channels, scale=channels**-0.5),
        depthwise=draw(width_of_group, 1, 5, 5, scale=0.2),
        pointwise=draw(2, width_of_group, 1, 1, scale=width_of_group**-0.5),
        table=draw(groups, heads // groups, _TABLE_SIDE, _TABLE_SIDE, scale=0.01),
        heads=heads,
    )


def _sizes(height: int, width: int, device: torch.device) -> Tensor:
    return torch.tensor([width, height], device=device)


def _grid(height: int, width: int, device: torch.device) -> Tensor:
    """(H, W, 2) centres (x, y) of the cells of [-1, 1] x [-1, 1]."""
    y, x = (2 * (torch.arange(n, device=device) + 0.5) / n - 1 for n in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)


def sample_keys(maps: Tensor, positions: Tensor) -> Tensor:
    """(G, C / G, K) samples of (G, C / G, H, W) maps at (G, H, W, 2) positions."""
    return F.grid_sample(maps, positions, align_corners=True).flatten(2)


def sample_by_attention(sampler: partial[Tensor], layer: Layer) -> Tensor:
    """The same by multi-scale deformable attention with one level and one point: groups are heads.

    It needs the map token by token, and locations that span pixels instead of their centres.
    """
    maps = layer.grouped
    groups, channels, height, width = maps.shape
    pixels = (layer.positions + 1) / 2 * (_sizes(height, width, maps.device) - 1)
    locations = (pixels + 0.5) / _sizes(height, width, maps.device)
    locations = locations.flatten(1, 2).transpose(0, 1)[None, :, :, None, None]
    value = maps.flatten(2).permute(2, 0, 1).contiguous().unsqueeze(0)  # (1, S, G, C / G)
    weights = torch.ones_like(locations[..., 0])  # (1, K, G, 1, 1)
    samples = sampler(value, [(height, width)], locations, weights)
    return samples.view(-1, groups, channels).permute(1, 2, 0).contiguous()


def attend(layer: Layer) -> Tensor:
    """(1, C, H, W) output of the layer, a block of queries at a time."""
    _, channels, height, width = layer.x.shape
    to_query, to_key, to_value, to_output = layer.projections[..., None, None].unbind(0)
    query = F.conv2d(layer.x, to_query)
    positions = _predict_positions(layer, query)
    samples = sample_keys(layer.grouped, positions).view(1, channels, height, width)
    key, value = F.conv2d(samples, to_key), F.conv2d(samples, to_value)
    query, key, value = (t.view(layer.heads, -1, height * width) for t in (query, key, value))
    scale = query.shape[1] ** -0.5
    blocks = []
    for start in range(0, height * width, _QUERIES_AT_ONCE):
        block = query[:, :, start : start + _QUERIES_AT_ONCE]
        logits = torch.baddbmm(
            sample_bias(layer, positions, start), block.transpose(1, 2), key, alpha=scale
        )
        blocks.append(value @ logits.softmax(-1).transpose(1, 2))
    return F.conv2d(torch.cat(blocks, dim=-1).view(1, channels, height, width), to_output)


def _predict_positions(layer: Layer, query: Tensor) -> Tensor:
    """(G, H, W, 2) places of the keys, from the queries."""
    _, channels, height, width = query.shape
    groups = layer.table.shape[0]
    features = query.view(groups, channels // groups, height, width)
    features = F.conv2d(features, layer.depthwise, padding=2, groups=channels // groups)
    features = F.layer_norm(features.movedim(1, -1), [channels // groups]).movedim(-1, 1)
    offsets = F.conv2d(F.gelu(features), layer.pointwise).movedim(1, -1).flip(-1)
    sizes = _sizes(height, width, query.device)
    return _grid(height, width, query.device) + offsets.tanh() * _OFFSET_RANGE / sizes


def sample_bias(layer: Layer, positions: Tensor, start: int) -> Tensor:
    """(heads, block, K) biases of a block of queries."""
    _, _, height, width = layer.x.shape
    queries = _grid(height, width, layer.x.device).flatten(0, 1)[start : start + _QUERIES_AT_ONCE]
    displacement = (queries[:, None] - positions.flatten(1, 2)[:, None]) * 0.5
    return F.grid_sample(layer.table, displacement, align_corners=True).flatten(0, 1)


def sample_all_biases(layer: Layer) -> None:
    """The biases of all queries, block by block as in `attend`."""
    for start in range(0, layer.x.shape[2] * layer.x.shape[3], _QUERIES_AT_ONCE):
        sample_bias(layer, layer.positions, start)
