"""Clustering of tokens by locality-sensitive hashing, for the Adaptive Clustering Transformer.

Zheng et al., "End-to-End Object Detection with Adaptive Clustering Transformer", BMVC 2021. Each
row, that is each head of each image, is clustered on its own:

    cell_t(x) = floor((x . direction_t + bias_t) / width)          rounds t = 1 .. T
    key(x)    = sum over t of cell_t(x) * multiplier_t             modulo 2^64

Tokens with equal keys form a cluster, the prototype of a cluster is the mean of its members, and
what attention computes for a prototype is handed to every member.

The multipliers decide which tokens share a key:

* `distinct_multipliers`, the default, are fixed random odd numbers. Tokens in the same cells always
  share a key. For tokens in different cells to share one, the differences of their cells, weighted
  by the multipliers, must add up to a multiple of 2^64. That cannot happen if they differ in one
  round only; otherwise its probability over the choice of the multipliers is at most 2^(v-63),
  where 2^v is the largest power of two that divides all the differences. For cells at most 64 apart
  that is 2^-57: one accident in 10^9 rows of 16,800 tokens. The number of rounds does not matter.
* `published_multipliers` are 4^t, the two bits a round of the published code. Cells that span more
  than four values carry into the next round, so that different cells can share a key.

The published code also subtracts the smallest cell of each round in a row. That adds the same
constant to all keys of the row, which never changes who shares a key with whom, and is left out.

Shape letters: B images, H heads, N tokens, D channels a head, C clusters, T rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_detr.ops import lsh_clustering_pytorch as in_pytorch
from efficient_detr.ops.deformable_attention_pytorch import real_dtype
from efficient_detr.ops.library import choose
from efficient_detr.ops.lsh_clustering_library import OPERATORS

# Beyond these, the quotients of directions and width leave the range of float32.
_NARROWEST, _WIDEST = 1e-6, 1e6


@dataclass(frozen=True)
class HashProjections:
    """What turns tokens into keys; a module keeps the tensors as buffers.

    Attributes:
        directions: (D, T) drawn from N(0, 1).
        bias: (T,) drawn from U(0, b).
        width: of a cell, from 1e-6 to 1e6, in units of the projected tokens.
        multipliers: (T,) int64, see the module.
    """

    directions: Tensor
    bias: Tensor
    width: float
    multipliers: Tensor


@dataclass(frozen=True)
class ClusterAssignment:
    """Which token belongs to which cluster.

    Attributes:
        ids: (B, H, N) int64; clusters of a row are numbered in the order of their first tokens,
            padded tokens have -1.
        counts: (B, H, C) int64 numbers of members; a row with fewer than C clusters has zeros at
            the end.
        num_clusters: (B, H) int64, how many clusters the keys made; more than C only if a capacity
            was given and exceeded.
    """

    ids: Tensor
    counts: Tensor
    num_clusters: Tensor


def distinct_multipliers(rounds: int) -> Tensor:
    """(T,) int64 odd multipliers that keep different cells apart; the same on every call.

    They are the first T outputs of the generator SplitMix64 (Steele et al. 2014) with seed 0.
    """
    modulus = 1 << 64
    multipliers = []
    for index in range(1, rounds + 1):
        z = index * 0x9E3779B97F4A7C15 % modulus
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % modulus
        z = (z ^ z >> 27) * 0x94D049BB133111EB % modulus
        z = z ^ z >> 31 | 1
        multipliers.append(z - modulus if z >> 63 else z)
    return torch.tensor(multipliers, dtype=torch.int64)


def published_multipliers(rounds: int) -> Tensor:
    """(T,) int64 powers of four, which give the keys of the published code.

    Raises:
        ValueError: for more than 32 rounds, which do not fit into 64 bits at two bits each.
    """
    if rounds > 32:
        raise ValueError(f"the published keys hold at most 32 rounds of hashing, not {rounds}")
    return torch.tensor([4**t for t in range(rounds)], dtype=torch.int64)


def draw_projections(
    channels: int,
    rounds: int,
    *,
    width: float = 8.0,
    bias_range: float = 1.0,
    generator: torch.Generator | None = None,
) -> HashProjections:
    """Draws projections on the CPU: directions first, then biases, as the published code does.

    Args:
        channels: D.
        rounds: T; more of them make more and tighter clusters.
        width: of a cell. With the default bias range and short tokens (|x . direction| < width - 1)
            a cell is no more than the sign of x . direction + bias, whatever the width.
        bias_range: biases are uniform in [0, bias_range). The published code has 1; hashing by
            Euclidean distance (E2LSH) asks for `width`, which makes far fewer clusters.
        generator: of the random numbers; the global one if None.

    Returns:
        Float32 projections with `distinct_multipliers`.
    """
    return HashProjections(
        directions=torch.randn(channels, rounds, generator=generator),
        bias=torch.rand(rounds, generator=generator) * bias_range,
        width=width,
        multipliers=distinct_multipliers(rounds),
    )


def cluster_tokens(
    points: Tensor,
    projections: HashProjections,
    padding_mask: Tensor | None = None,
    *,
    capacity: int | None = None,
    implementation: str | None = None,
) -> ClusterAssignment:
    """Clusters the tokens of each row: `hash_keys` and `group_by_key` in one.

    Args:
        points: (B, H, N, D), for example queries; may be a view of (B, N, H, D).
        projections: how to hash them.
        padding_mask: (B, N) bool, True for tokens that belong to no cluster; None for no padding.
        capacity: see `group_by_key`.
        implementation: "compiled" or "pytorch"; None leaves the choice to `library.choose`.

    Returns:
        The assignment, through which no gradient flows.
    """
    keys = hash_keys(points, projections, implementation=implementation)
    return group_by_key(keys, padding_mask, capacity=capacity, implementation=implementation)


def hash_keys(
    points: Tensor, projections: HashProjections, *, implementation: str | None = None
) -> Tensor:
    """Hashes tokens to keys.

    Computed in float32, or in float64 if the points are: rounding to 16 bits moves tokens across
    the borders of cells. Cells are numbered from -2^30 to 2^30: what is further out, infinity
    included, lies in the outermost cell, and NaN in the lowest. So tokens that are not finite get
    well-defined keys, and with `distinct_multipliers` share clusters only with their like.

    Args:
        points: (B, H, N, D); may be a view of (B, N, H, D).
        projections: with directions (D, T), bias (T,) and multipliers (T,).
        implementation: "compiled" or "pytorch"; None leaves the choice to `library.choose`.

    Returns:
        (B, H, N) int64 keys, all 64 bits of which count.

    Raises:
        ValueError: if the shapes do not fit together or the width is out of range.
    """
    _check_projections(points, projections)
    dtype = real_dtype(points.dtype)
    arguments = (
        points.detach().to(dtype),
        projections.directions.detach().to(dtype),
        projections.bias.detach().to(dtype),
        projections.width,
        projections.multipliers,
    )
    if choose(points.device, implementation) == "compiled":
        return OPERATORS.lsh_hash(*arguments)
    return in_pytorch.lsh_hash(*arguments)


def group_by_key(
    keys: Tensor,
    padding_mask: Tensor | None = None,
    *,
    capacity: int | None = None,
    implementation: str | None = None,
) -> ClusterAssignment:
    """Makes a cluster of the tokens of a row that have equal keys.

    Args:
        keys: (B, H, N) int64, any numbers.
        padding_mask: (B, N) bool, True for tokens that belong to no cluster; None for no padding.
        capacity: the C of the result. Without it, C is the largest number of clusters in a row, at
            least 1, which depends on the data: a GPU has to hand that number to the host, which
            waits for it. With it nobody waits. Cluster i of a row with more clusters than that is
            merged with cluster i modulo capacity: every token keeps a cluster, and the surplus is
            spread evenly. Compare `num_clusters` with it now and then.
        implementation: "compiled" or "pytorch"; None leaves the choice to `library.choose`.

    Returns:
        The assignment. It does not depend on the implementation or the number of threads.

    Raises:
        ValueError: if the shapes do not fit together or the capacity is below 1.
    """
    _check_keys(keys, padding_mask, capacity)
    if choose(keys.device, implementation) == "compiled":
        return ClusterAssignment(*OPERATORS.lsh_group(keys, padding_mask, capacity))
    return ClusterAssignment(*in_pytorch.lsh_group(keys, padding_mask, capacity))


def cluster_mean(
    points: Tensor, ids: Tensor, counts: Tensor, *, implementation: str | None = None
) -> Tensor:
    """Prototypes: the mean of the members of each cluster.

    Differentiable in `points`: a member gets the gradient of its prototype, divided by the number
    of members. Sums are kept in float32 or better and added in the order of the tokens on a CPU,
    in a fixed order on a GPU, so that the result is the same in every run.

    Args:
        points: (B, H, N, D); may be a view of (B, N, H, D).
        ids: (B, H, N) int64; tokens with ids outside [0, C) are left out.
        counts: (B, H, C) int64 numbers of members.
        implementation: "compiled" or "pytorch"; None leaves the choice to `library.choose`.

    Returns:
        (B, H, C, D) in the dtype of `points`; zero for clusters without members.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _check_rows(points, ids, counts)
    if points.shape[:3] != ids.shape:
        raise ValueError(f"points {_sizes(points)} and ids {_sizes(ids)} differ in B, H or N")
    arguments = (points.to(real_dtype(points.dtype)), ids, counts.shape[2], counts)
    if choose(points.device, implementation) == "compiled":
        return OPERATORS.cluster_reduce(*arguments).to(points.dtype)
    return in_pytorch.cluster_reduce(*arguments).to(points.dtype)


def cluster_broadcast(
    prototypes: Tensor, ids: Tensor, *, implementation: str | None = None
) -> Tensor:
    """Hands the row of each cluster to its members.

    Differentiable in `prototypes`: a cluster gets the sum of the gradients of its members.

    Args:
        prototypes: (B, H, C, D), any values that belong to clusters.
        ids: (B, H, N) int64.
        implementation: "compiled" or "pytorch"; None leaves the choice to `library.choose`.

    Returns:
        (B, H, N, D) in the dtype of `prototypes`; zero for tokens with ids outside [0, C). The
        compiled operator lays it out as a view of (B, N, H, D), so that merging heads is free.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _check_rows(prototypes, ids, None)
    arguments = (prototypes.to(real_dtype(prototypes.dtype)), ids, None)
    if choose(prototypes.device, implementation) == "compiled":
        return OPERATORS.cluster_broadcast(*arguments).to(prototypes.dtype)
    return in_pytorch.cluster_broadcast(*arguments).to(prototypes.dtype)


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_projections(points: Tensor, projections: HashProjections) -> None:
    if not points.is_floating_point():
        raise ValueError(f"points must be floating, but are {points.dtype}")
    directions = projections.directions
    rounds = directions.shape[-1] if directions.dim() else 0
    if points.dim() != 4 or directions.shape != (points.shape[-1], rounds):
        raise ValueError(
            "points must be (B, H, N, D) and directions (D, T), but are "
            f"{_sizes(points)} and {_sizes(directions)}"
        )
    if projections.bias.shape != (rounds,) or projections.multipliers.shape != (rounds,):
        raise ValueError(
            f"bias and multipliers must be ({rounds},), a number for each column of the "
            f"directions, but are {_sizes(projections.bias)} and {_sizes(projections.multipliers)}"
        )
    if not _NARROWEST <= projections.width <= _WIDEST:
        raise ValueError(
            f"the width of a cell must lie between {_NARROWEST} and {_WIDEST}, but is "
            f"{projections.width}"
        )
    if projections.multipliers.dtype != torch.int64:
        raise ValueError(f"multipliers must be int64, but are {projections.multipliers.dtype}")


def _check_keys(keys: Tensor, padding_mask: Tensor | None, capacity: int | None) -> None:
    if keys.dim() != 3 or keys.dtype != torch.int64:
        raise ValueError(f"keys must be int64 (B, H, N), but are {keys.dtype} {_sizes(keys)}")
    if padding_mask is not None and (
        padding_mask.dtype != torch.bool or padding_mask.shape != (keys.shape[0], keys.shape[2])
    ):
        raise ValueError(
            f"padding_mask must be bool {(keys.shape[0], keys.shape[2])}, one entry a token, but "
            f"is {padding_mask.dtype} {_sizes(padding_mask)}"
        )
    if capacity is not None and (not isinstance(capacity, int | torch.SymInt) or capacity < 1):
        raise ValueError(f"capacity must be an integer of at least 1, but is {capacity}")


def _check_rows(tensor: Tensor, ids: Tensor, counts: Tensor | None) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"points and prototypes must be floating, but are {tensor.dtype}")
    for name, integers in (("ids", ids), ("counts", counts)):
        if integers is not None and integers.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, but are {integers.dtype}")
        if integers is not None and integers.device != tensor.device:
            raise ValueError(f"{name} are on {integers.device}, but the rest on {tensor.device}")
    rows = tensor.shape[:2]
    if tensor.dim() != 4 or ids.dim() != 3 or ids.shape[:2] != rows:
        raise ValueError(
            "points or prototypes must be (B, H, ., D) and ids (B, H, N), but are "
            f"{_sizes(tensor)} and {_sizes(ids)}"
        )
    if counts is not None and (counts.dim() != 3 or counts.shape[:2] != rows):
        raise ValueError(f"counts must be {(*rows, 'C')}, but are {_sizes(counts)}")
