"""The operators of LSH clustering in plain PyTorch: definition, and path without a compiler.

Arguments and results are those of the compiled operators in `lsh_clustering_library`; what they
mean is said in `lsh_clustering`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Cells are numbered from -CELL_LIMIT to CELL_LIMIT, powers of two that float32 holds exactly.
CELL_LIMIT = 2.0**30


def lsh_hash(
    points: Tensor, directions: Tensor, bias: Tensor, width: float, multipliers: Tensor
) -> Tensor:
    """(B, H, N) int64 keys of (B, H, N, D) points; all floating tensors have one dtype."""
    with torch.autocast(points.device.type, enabled=False):
        position = (points @ directions).add_(bias).div_(width)
    cells = position.floor_().clamp_(-CELL_LIMIT, CELL_LIMIT).nan_to_num_(nan=-CELL_LIMIT)
    return (cells.long() * multipliers).sum(-1)


def lsh_group(
    keys: Tensor, padding_mask: Tensor | None, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, H, N), counts (B, H, C) and numbers of clusters (B, H) of (B, H, N) keys."""
    ids = torch.zeros_like(keys)
    if keys.shape[2]:
        ids = _number_by_first_token(_hide_padding(keys, padding_mask))
    if padding_mask is not None:
        ids = ids.masked_fill(padding_mask.unsqueeze(1), -1)
    num_clusters = keys.new_zeros(keys.shape[:2])
    if keys.shape[2]:
        num_clusters = ids.amax(-1) + 1
    if capacity is None:
        clusters = max(int(num_clusters.max()), 1) if num_clusters.numel() else 1
    else:
        clusters = capacity
        ids = torch.where(ids >= capacity, ids % capacity, ids)
    counts = keys.new_zeros(*keys.shape[:2], clusters + 1)
    counts.scatter_add_(2, _with_spare_cluster(ids, clusters), torch.ones_like(ids))
    return ids, counts[..., :clusters], num_clusters


def _hide_padding(keys: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Gives padded tokens the key of the first real one, so that they make no cluster."""
    if padding_mask is None:
        return keys
    first_real = (~padding_mask).byte().argmax(1)[:, None, None].expand(-1, keys.shape[1], 1)
    return torch.where(padding_mask.unsqueeze(1), keys.gather(2, first_real), keys)


def _number_by_first_token(keys: Tensor) -> Tensor:
    """(B, H, N) ids of equal keys, in the order of the first tokens that have them."""
    in_order, order = keys.sort(dim=-1, stable=True)  # equal keys stay in the order of tokens
    starts = torch.ones_like(keys, dtype=torch.bool)
    starts[..., 1:] = in_order[..., 1:] != in_order[..., :-1]
    # The id of a first token is the number of first tokens before it.
    is_first = torch.zeros_like(starts).scatter_(-1, order, starts)
    id_of_first = is_first.cumsum(-1) - 1
    # Every token takes the id of the first one of its run of equal keys.
    place = torch.arange(keys.shape[-1], device=keys.device)
    start = torch.where(starts, place, 0).cummax(-1).values
    ids_in_order = id_of_first.gather(-1, order.gather(-1, start))
    return torch.empty_like(keys).scatter_(-1, order, ids_in_order)


def _with_spare_cluster(ids: Tensor, clusters: int) -> Tensor:
    """Ids in [0, C], where C stands for no cluster."""
    return torch.where((ids >= 0) & (ids < clusters), ids, clusters)


def _rows_of_clusters(ids: Tensor, clusters: int) -> Tensor:
    """(B H N,) row numbers of each token's cluster in a table of (B H (C + 1)) rows."""
    rows = torch.arange(ids.shape[0] * ids.shape[1], device=ids.device).view(*ids.shape[:2], 1)
    return (rows * (clusters + 1) + _with_spare_cluster(ids, clusters)).flatten()


def cluster_reduce(points: Tensor, ids: Tensor, num_clusters: int, counts: Tensor | None) -> Tensor:
    """(B, H, C, D) sums of the (B, H, N, D) members of clusters, divided by counts if given."""
    images, heads, _, channels = points.shape
    table = points.new_zeros(images * heads * (num_clusters + 1), channels)
    rows = _rows_of_clusters(ids, num_clusters)
    table = table.index_add(0, rows, points.reshape(-1, channels))
    sums = table.view(images, heads, num_clusters + 1, channels)[:, :, :num_clusters]
    return sums if counts is None else sums / counts.clamp(min=1).unsqueeze(-1)


def cluster_broadcast(prototypes: Tensor, ids: Tensor, counts: Tensor | None) -> Tensor:
    """(B, H, N, D) prototypes of each token's cluster, divided by counts if given."""
    if counts is not None:
        prototypes = prototypes / counts.clamp(min=1).unsqueeze(-1)
    images, heads, clusters, channels = prototypes.shape
    spare = prototypes.new_zeros(images, heads, 1, channels)
    table = torch.cat([prototypes, spare], dim=2).view(-1, channels)
    return table.index_select(0, _rows_of_clusters(ids, clusters)).view(*ids.shape, channels)
