"""Neighbourhood attention in PyTorch's own operators.

Queries are taken in square tiles. The keys that the queries of a tile see lie in one rectangle,
the tile and its surroundings; attention in it is dense, and a mask leaves to every query the k * k
keys that it sees. All tiles but those at the borders are alike, and their rectangles are views of
the map.

On one thread of a CPU, for 200 x 320 cells, 2 heads of 32 channels and neighbourhoods of 7 x 7,
this takes 0.3 s and hardly more memory than the maps, and 1.0 s and 50 MB with the backward pass. A
loop over the 49 shifts took 2.4 s and 0.9 GB, and 7.1 s and 2.8 GB; gathering the neighbours of one
row after the other, 2.2 s and 0.5 GB.

Maps are (B, H, W, heads, D) here: D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_detr.ops.deformable_attention_pytorch import real_dtype

# Longest side of a tile. Short tiles copy more keys for each query, long ones multiply more that
# the mask throws away; for neighbourhoods of 7, sides of 5 to 8 are about equally good.
_TILE = 8

# Logits that exist at one time, unless a single row of tiles has more: what fits into the caches of
# a CPU, and enough to fill a GPU.
_LOGITS_ON_CPU = 2**19
_LOGITS_ELSEWHERE = 2**24


@dataclass(frozen=True)
class _Run:
    """Successive tiles along one side of a map that are alike.

    Attributes:
        count: number of tiles.
        side: number of queries of each.
        first_query: of the first tile; the others follow at distances of `side`.
        span: number of keys of each.
        first_key: of the first tile.
        distances: for each query of a tile, for each of its keys, the place in the table of biases:
            key minus query plus k - 1, or 2k - 1 for a key that the query does not see.
    """

    count: int
    side: int
    first_query: int
    span: int
    first_key: int
    distances: list[list[int]]

    def split(self, longest: int) -> Iterator[_Run]:
        """The same tiles in runs of at most so many."""
        for skipped in range(0, self.count, longest):
            yield _Run(
                count=min(longest, self.count - skipped),
                side=self.side,
                first_query=self.first_query + skipped * self.side,
                span=self.span,
                first_key=self.first_key + skipped * self.side,
                distances=self.distances,
            )


def _runs(size: int, kernel_size: int) -> list[_Run]:
    """Cut a side of a map into tiles of equal size; the last one may reach beyond the map."""
    side = -(-size // -(-size // _TILE))
    span = min(side + kernel_size - 1, size)

    def first_key(first_query: int) -> int:
        return _clamp(first_query - kernel_size // 2, size - span)

    def distances(first_query: int) -> list[list[int]]:
        keys = range(first_key(first_query), first_key(first_query) + span)
        queries = range(first_query, first_query + side)
        return [_distances(min(query, size - 1), keys, size, kernel_size) for query in queries]

    runs = []
    for alike, group in groupby(range(0, size, side), key=distances):
        members = list(group)
        runs.append(_Run(len(members), side, members[0], span, first_key(members[0]), alike))
    return runs


def _distances(query: int, keys: range, size: int, kernel_size: int) -> list[int]:
    """Place in the table for each key; at the border the neighbourhood is moved inward."""
    first = _clamp(query - kernel_size // 2, size - kernel_size)
    return [
        key - query + kernel_size - 1 if first <= key < first + kernel_size else 2 * kernel_size - 1
        for key in keys
    ]


def _clamp(place: int, last: int) -> int:
    return max(0, min(place, last))


@dataclass(frozen=True)
class _Block:
    """Tiles that are alike: one run along the columns of the map, and one along the rows."""

    rows: _Run
    columns: _Run

    def queries(self, features: Tensor) -> Tensor:
        """View of the queries of all tiles in a map, (B, R, t, S, u, heads, D)."""
        rows = features.narrow(1, self.rows.first_query, self.rows.count * self.rows.side)
        columns = self.columns.count * self.columns.side
        both = rows.narrow(2, self.columns.first_query, columns)
        return both.unflatten(2, (-1, self.columns.side)).unflatten(1, (-1, self.rows.side))

    def keys(self, features: Tensor) -> Tensor:
        """View of the keys of all tiles in a map, (B, R, S, heads, D, s, v)."""
        return self._keys_of_some(features, (1, 1), (0, 0))

    def add_to_keys(self, features: Tensor, tiles: Tensor) -> None:
        """Add tiles (B, R, S, heads, D, s, v) to the keys of a map; rectangles overlap."""
        steps = [-(-run.span // run.side) for run in (self.rows, self.columns)]
        apart = (range(min(step, run.count)) for step, run in zip(steps, self._runs, strict=True))
        for row, column in product(*apart):
            some = tiles[:, row :: steps[0], column :: steps[1]]
            self._keys_of_some(features, steps, (row, column)).add_(some)

    @property
    def _runs(self) -> tuple[_Run, _Run]:
        return self.rows, self.columns

    def _keys_of_some(self, features: Tensor, steps: Sequence[int], first: Sequence[int]) -> Tensor:
        """View of the keys of every so many tiles, from a tile on, in both directions."""
        for dim, run, step, skipped in zip((1, 2), self._runs, steps, first, strict=True):
            last = (run.count - 1 - skipped) // step * step * run.side
            start = run.first_key + skipped * run.side
            features = features.narrow(dim, start, last + run.span)
            features = features.unfold(dim, run.span, step * run.side)
        return features

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places in the table for each pair, broadcasting to (t, u, s, v)."""
        rows = torch.tensor(self.rows.distances, device=device)
        columns = torch.tensor(self.columns.distances, device=device)
        return rows[:, None, :, None], columns[None, :, None, :]


def _blocks(features: Tensor, kernel_size: int) -> Iterator[tuple[_Block, list[_Block]]]:
    """Cut a map into blocks; each comes with the parts of it that are to be taken at one time."""
    images, height, width, heads, _ = features.shape
    most = _LOGITS_ON_CPU if features.device.type == "cpu" else _LOGITS_ELSEWHERE
    for rows, columns in product(_runs(height, kernel_size), _runs(width, kernel_size)):
        pairs = rows.side * rows.span * columns.side * columns.span
        at_once = max(1, most // (images * heads * pairs * columns.count))
        yield _Block(rows, columns), [_Block(part, columns) for part in rows.split(at_once)]


def attend(query: Tensor, key: Tensor, value: Tensor, position_bias_table: Tensor) -> Tensor:
    """The operator; see `ops.neighborhood_attention`. Differentiable."""
    height, width = query.shape[1:3]
    kernel_size = (position_bias_table.shape[-1] + 1) // 2
    table = position_bias_table.to(real_dtype(query.dtype))
    query = _padded(query * query.shape[-1] ** -0.5, kernel_size)
    output = torch.empty_like(query)
    for block, parts in _blocks(key, kernel_size):
        bias = _position_bias(table, block)
        for part in parts:
            weights = _weights(_queries(query, part), _keys(key, part), bias).to(value.dtype)
            attended = torch.matmul(weights, _keys(value, part).transpose(-1, -2))
            part.queries(output).copy_(_spread_queries(attended, part))
    return output[:, :height, :width].contiguous()


def gradients(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, position_bias_table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of `attend` by its four arguments, each of the shape and dtype of its argument.

    Attention weights are computed again, so that nothing but the arguments has to be kept.
    """
    height, width = query.shape[1:3]
    kernel_size = (position_bias_table.shape[-1] + 1) // 2
    dtype, scale = real_dtype(query.dtype), query.shape[-1] ** -0.5
    table = position_bias_table.to(dtype)
    grad_output, scaled = _padded(grad_output, kernel_size), _padded(query * scale, kernel_size)
    grad_query = torch.empty_like(scaled)
    grad_key, grad_value = (torch.zeros_like(features, dtype=dtype) for features in (key, value))
    grad_table = torch.zeros_like(_bounded(table))
    for block, parts in _blocks(key, kernel_size):
        bias = _position_bias(table, block)
        grad_bias = torch.zeros_like(bias)
        for part in parts:
            grad_attended, queries = _queries(grad_output, part), _queries(scaled, part)
            keys = _keys(key, part)
            weights = _weights(queries, keys, bias)
            grad_values = torch.matmul(grad_attended.transpose(-1, -2), weights.to(value.dtype))
            part.add_to_keys(grad_value, _spread_keys(grad_values, part))
            grad_weights = torch.matmul(grad_attended, _keys(value, part)).to(dtype)
            grad_logits = _softmax_gradient(grad_weights, weights)
            grad_bias += grad_logits.sum((0, 1, 2))
            grad_logits = grad_logits.to(key.dtype)
            grad_queries = torch.matmul(grad_logits, keys.transpose(-1, -2)).mul_(scale)
            part.queries(grad_query).copy_(_spread_queries(grad_queries, part))
            grad_keys = torch.matmul(queries.transpose(-1, -2), grad_logits)
            part.add_to_keys(grad_key, _spread_keys(grad_keys, part))
        _add_to_table(grad_table, grad_bias, block)
    return (
        grad_query[:, :height, :width].contiguous(),
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        grad_table[:, :-1, :-1].to(position_bias_table.dtype).contiguous(),
    )


def _padded(features: Tensor, kernel_size: int) -> Tensor:
    """Fill up the last tiles."""
    missing = []
    for size in features.shape[1:3]:
        last = _runs(size, kernel_size)[-1]
        missing.append(last.first_query + last.count * last.side - size)
    return F.pad(features, (0, 0, 0, 0, 0, missing[1], 0, missing[0]))


def _bounded(table: Tensor) -> Tensor:
    """The table with another row and column for keys that are not seen."""
    return F.pad(table, (0, 1, 0, 1), value=-torch.inf)


def _position_bias(table: Tensor, block: _Block) -> Tensor:
    """Bias of each pair of a tile, (heads, queries, keys); -infinity where nothing is seen."""
    rows, columns = block.index(table.device)
    return _bounded(table)[:, rows, columns].flatten(3).flatten(1, 2)


def _add_to_table(grad_table: Tensor, grad_bias: Tensor, block: _Block) -> None:
    """Add the gradient of what `_position_bias` gives to that of the bounded table."""
    rows, columns = block.index(grad_table.device)
    heads = torch.arange(len(grad_table), device=grad_table.device)[:, None, None, None, None]
    side, span = (block.rows.side, block.columns.side), (block.rows.span, block.columns.span)
    pairs = grad_bias.unflatten(2, span).unflatten(1, side)
    # Unlike index_add_, the same sum in every run on a GPU.
    grad_table.index_put_((heads, rows, columns), pairs, accumulate=True)


def _weights(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Attention weights in the dtype of the bias, (B, R, S, heads, queries, keys)."""
    return torch.matmul(queries, keys).to(bias.dtype).add_(bias).softmax(-1)


def _softmax_gradient(grad_weights: Tensor, weights: Tensor) -> Tensor:
    products = grad_weights.mul_(weights)
    return products.addcmul_(weights, products.sum(-1, keepdim=True), value=-1)


def _queries(features: Tensor, block: _Block) -> Tensor:
    """Tiles of queries, (B, R, S, heads, queries, D)."""
    return block.queries(features).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def _spread_queries(tiles: Tensor, block: _Block) -> Tensor:
    """Inverse of `_queries` for `_Block.queries`."""
    side = (block.rows.side, block.columns.side)
    return tiles.unflatten(4, side).permute(0, 1, 4, 2, 5, 3, 6)


def _keys(features: Tensor, block: _Block) -> Tensor:
    """Tiles of keys or values, (B, R, S, heads, D, keys)."""
    return block.keys(features).flatten(5)


def _spread_keys(tiles: Tensor, block: _Block) -> Tensor:
    """Inverse of `_keys` for `_Block.add_to_keys`."""
    return tiles.unflatten(5, (block.rows.span, block.columns.span))
