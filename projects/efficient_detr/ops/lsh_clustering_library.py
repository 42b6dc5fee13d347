"""The compiled operators of LSH clustering as torch sees them: schemas, shapes, gradients, FLOPs.

All of this is registered on import, whether or not anything was compiled. The kernels themselves
register for their devices when `efficient_detr.ops.library` loads them. What they compute is said
in `lsh_clustering`.

Two of them are each other's transposes, each divided by the numbers of members if these are given:
`cluster_reduce` adds up members, `cluster_broadcast` copies to members. So each is the backward of
the other, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_SCHEMAS = (
    "lsh_hash(Tensor points, Tensor directions, Tensor bias, float width, Tensor multipliers) "
    "-> Tensor",
    "lsh_group(Tensor keys, Tensor? padding_mask, SymInt? capacity) "
    "-> (Tensor ids, Tensor counts, Tensor num_clusters)",
    "cluster_reduce(Tensor points, Tensor ids, SymInt num_clusters, Tensor? counts) -> Tensor",
    "cluster_broadcast(Tensor prototypes, Tensor ids, Tensor? counts) -> Tensor",
)

_LIBRARY = torch.library.Library("efficient_detr", "FRAGMENT")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _device_type in ("cpu", "cuda"):
        _name = f"efficient_detr::{_schema.partition('(')[0]}"
        torch.library.register_autocast(_name, _device_type, torch.float32)

OPERATORS = torch.ops.efficient_detr
"""Where the operators are called: `OPERATORS.lsh_hash(...)`."""


@torch.library.register_fake("efficient_detr::lsh_hash")
def _(
    points: Tensor, directions: Tensor, bias: Tensor, width: float, multipliers: Tensor
) -> Tensor:
    return points.new_empty(points.shape[:3], dtype=torch.int64)


@torch.library.register_fake("efficient_detr::lsh_group")
def _(
    keys: Tensor, padding_mask: Tensor | None, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    clusters: Any = capacity
    if capacity is None:
        clusters = torch.library.get_ctx().new_dynamic_size(min=1)
    rows = keys.shape[:2]
    return keys.new_empty(keys.shape), keys.new_empty(*rows, clusters), keys.new_empty(rows)


@torch.library.register_fake("efficient_detr::cluster_reduce")
def _(points: Tensor, ids: Tensor, num_clusters: int, counts: Tensor | None) -> Tensor:
    return points.new_empty(*points.shape[:2], num_clusters, points.shape[3])


@torch.library.register_fake("efficient_detr::cluster_broadcast")
def _(prototypes: Tensor, ids: Tensor, counts: Tensor | None) -> Tensor:
    images, heads, tokens = ids.shape
    return prototypes.new_empty(images, tokens, heads, prototypes.shape[3]).transpose(1, 2)


def _setup_reduce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, _, counts = inputs
    ctx.save_for_backward(ids, counts)


def _reduce_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    ids, counts = ctx.saved_tensors
    return OPERATORS.cluster_broadcast(gradient, ids, counts), None, None, None


def _setup_broadcast(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prototypes, ids, counts = inputs
    ctx.save_for_backward(ids, counts)
    ctx.num_clusters = prototypes.shape[2]


def _broadcast_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    ids, counts = ctx.saved_tensors
    return OPERATORS.cluster_reduce(gradient, ids, ctx.num_clusters, counts), None, None


torch.library.register_autograd(
    "efficient_detr::cluster_reduce", _reduce_backward, setup_context=_setup_reduce
)
torch.library.register_autograd(
    "efficient_detr::cluster_broadcast", _broadcast_backward, setup_context=_setup_broadcast
)


def hashing_multiply_adds(points_shape: Sequence[int], directions_shape: Sequence[int]) -> int:
    """Cost of `lsh_hash`: B H N D T to project; finding cells is not counted."""
    return prod(points_shape) * directions_shape[1]


def reducing_additions(points_shape: Sequence[int]) -> int:
    """Cost of `cluster_reduce`: one addition for each of the B H N D numbers."""
    return prod(points_shape)


# torch hands formulas the shapes of tensors, and all other arguments as they are.
@register_flop_formula(OPERATORS.lsh_hash)
def _(points: Any, directions: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * hashing_multiply_adds(points, directions)  # as torch counts


@register_flop_formula(OPERATORS.cluster_reduce)
def _(points: Any, *args: Any, **kwargs: Any) -> int:
    return reducing_additions(points)


@register_flop_formula([OPERATORS.lsh_group, OPERATORS.cluster_broadcast])
def _(*args: Any, **kwargs: Any) -> int:
    """Comparisons and copies, no arithmetic."""
    return 0
