"""Cases of LSH clustering: hash, group, average, hand back; as a whole and step by step.

Sizes are those of ACT: 8 heads of 32 channels, 32 rounds of hashing, and the tokens of an image of
800 x 1333 pixels at strides 32, 16 and 8. Shape letters as in `efficient_detr.ops.lsh_clustering`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from kernel_benchmark.case import COMPILED, Case, Comparison, Contender, Plan, to_device
from torch import Tensor

from efficient_detr.ops import library
from efficient_detr.ops.lsh_clustering import (
    ClusterAssignment,
    HashProjections,
    cluster_broadcast,
    cluster_mean,
    draw_projections,
    group_by_key,
    hash_keys,
)

Formulation = Callable[[Tensor, HashProjections], Tensor]

PYTORCH = "PyTorch of this project"
SHIFT_SUM = "int64 shift and sum, sort"
UNIQUE = "int64 shift and sum, unique"
MATRIX_KEYS = "keys by float64 matrix product, unique"
PUBLISHED_KEYS = (SHIFT_SUM, UNIQUE)

HEADS, CHANNELS, ROUNDS = 8, 32, 32
_REQUIRED = {"lsh_total": 6.0}

# Tokens are noisy copies of one in eight of them. With the published width, this much noise makes
# 0.26 to 0.27 clusters a token.
_TOKENS_A_CENTRE = 8
_CENTRE_SCALE, _NOISE_SCALE = 0.8, 0.0165

# Rounding decides into which cell a token on the border falls; none is drawn closer than this, in
# cells.
_DISTANCE_FROM_BORDERS = 1e-4
_TOLERANCE = 1e-5


# Formulations ------------------------------------------------------------------------------------


def cluster_by_ops(points: Tensor, projections: HashProjections, implementation: str) -> Tensor:
    """The project's own functions: each token gets the mean of its cluster."""
    keys = hash_keys(points, projections, implementation=implementation)
    clusters = group_by_key(keys, implementation=implementation)
    means = cluster_mean(points, clusters.ids, clusters.counts, implementation=implementation)
    return cluster_broadcast(means, clusters.ids, implementation=implementation)


def _shifted_keys(points: Tensor, projections: HashProjections) -> Tensor:
    """Keys as the published code makes them: two bits a round, counted from the row's minimum."""
    positions = (points @ projections.directions + projections.bias) / projections.width
    cells = positions.floor().long()
    cells = cells - cells.amin(2, keepdim=True)
    shifts = 2 * torch.arange(cells.shape[-1], device=cells.device)
    return (cells << shifts).sum(-1)


def cluster_by_sorting(points: Tensor, projections: HashProjections) -> Tensor:
    """Shift and sum; sorted keys number the clusters of each row."""
    keys, order = _shifted_keys(points, projections).sort(dim=-1)
    starts = torch.zeros_like(keys)
    starts[..., 1:] = keys[..., 1:] != keys[..., :-1]
    ids = torch.empty_like(keys).scatter_(-1, order, starts.cumsum(-1))
    clusters = int(ids.max()) + 1
    counts = points.new_zeros(*ids.shape[:2], clusters)
    counts.scatter_add_(-1, ids, torch.ones_like(ids, dtype=points.dtype))
    wide_ids = ids.unsqueeze(-1).expand_as(points)
    sums = points.new_zeros(*counts.shape, points.shape[-1]).scatter_add_(2, wide_ids, points)
    return (sums / counts.clamp_min(1).unsqueeze(-1)).gather(2, wide_ids)


def cluster_by_unique(points: Tensor, projections: HashProjections) -> Tensor:
    """Shift and sum; `torch.unique` over all rows at once."""
    return _average_equal_keys(points, _shifted_keys(points, projections))


def cluster_by_matrix_keys(points: Tensor, projections: HashProjections) -> Tensor:
    """Keys as integers in float64, so that a matrix product sums the rounds.

    The sums stay below 2^53 as long as cells are numbered from -64 to 64.
    """
    channels, rounds = projections.directions.shape
    positions = torch.addmm(
        projections.bias / projections.width,
        points.reshape(-1, channels),
        projections.directions / projections.width,
    )
    factors = (projections.multipliers.abs() % (1 << 41) | 1).double().view(rounds, 1)
    keys = (positions.floor_().double() @ factors).long().view(points.shape[:3])
    return _average_equal_keys(points, keys)


def _average_equal_keys(points: Tensor, keys: Tensor) -> Tensor:
    """(B, H, N, D): for each token the mean of those of its row with the same key."""
    rows = torch.arange(keys.shape[0] * keys.shape[1], device=keys.device)
    # The constant keeps rows apart, as a hash does; it is the golden ratio in 64 bits.
    of_row = (rows * -0x61C8864680B583EB).view(*keys.shape[:2], 1)
    unique, ids, counts = torch.unique(keys + of_row, return_inverse=True, return_counts=True)
    ids, flat = ids.flatten(), points.reshape(-1, points.shape[-1])
    sums = flat.new_zeros(len(unique), flat.shape[-1]).index_add_(0, ids, flat)
    return (sums / counts.unsqueeze(-1)).index_select(0, ids).view(points.shape)


# Inputs ------------------------------------------------------------------------------------------


def draw_tokens(rows: tuple[int, int], tokens: int, projections: HashProjections) -> Tensor:
    """(B, H, N, D) tokens that resemble each other in groups, the same in every run.

    Args:
        rows: B and H.
        tokens: N.
        projections: the ones whose cells' borders tokens stay away from.
    """
    generator = torch.Generator().manual_seed(1)
    centres = max(tokens // _TOKENS_A_CENTRE, 1)
    shape = (*rows, centres, CHANNELS)
    around = _CENTRE_SCALE * torch.randn(shape, generator=generator)
    choice = torch.randint(centres, (*rows, tokens, 1), generator=generator)
    base = around.gather(2, choice.expand(-1, -1, -1, CHANNELS))
    points = base + _NOISE_SCALE * torch.randn(base.shape, generator=generator)
    while bool((close := _is_close_to_border(points, projections)).any()):
        noise = _NOISE_SCALE * torch.randn(int(close.sum()), CHANNELS, generator=generator)
        points[close] = base[close] + noise
    return points


def _is_close_to_border(points: Tensor, projections: HashProjections) -> Tensor:
    positions = (points @ projections.directions + projections.bias) / projections.width
    return ((positions - positions.round()).abs() < _DISTANCE_FROM_BORDERS).any(-1)


def _inputs(
    device: torch.device, rows: tuple[int, int], tokens: int
) -> tuple[Tensor, HashProjections]:
    generator = torch.Generator().manual_seed(0)
    projections = draw_projections(CHANNELS, ROUNDS, generator=generator)
    points = draw_tokens(rows, tokens, projections)
    # Heads are slices of the channels of a token, as attention leaves them.
    points = points.transpose(1, 2).contiguous().to(device).transpose(1, 2)
    directions, bias, multipliers = to_device(
        device, projections.directions, projections.bias, projections.multipliers
    )
    return points, HashProjections(directions, bias, projections.width, multipliers)


def _exactly(points: Tensor, projections: HashProjections) -> Tensor:
    exact = HashProjections(
        projections.directions.double(),
        projections.bias.double(),
        projections.width,
        projections.multipliers,
    )
    return cluster_by_matrix_keys(points.double(), exact)


# Cases -------------------------------------------------------------------------------------------


def plan_clustering(device: torch.device, *, small: bool) -> Iterator[Plan]:
    """The whole at three sizes, then the four steps at the middle one."""
    sizes = {"lsh_total": (2, 4200), "lsh_total_1050": (2, 1050), "lsh_total_16800": (1, 16800)}
    for name, (batch, tokens) in sizes.items():
        tokens = tokens // 50 if small else tokens
        comparisons = (
            Comparison(name, COMPILED, PUBLISHED_KEYS, _REQUIRED.get(name)),
            Comparison(f"{name}_over_fallback", COMPILED, (PYTORCH,)),
            Comparison(f"{name}_over_small_cells", COMPILED, (MATRIX_KEYS,)),
        )
        yield Plan(
            f"LSH clustering, {batch * HEADS} rows of {tokens} tokens",
            comparisons,
            partial(build_total, device, (batch, HEADS), tokens),
        )
    tokens = 4200 // 50 if small else 4200
    for step in STEPS:
        yield Plan(
            f"LSH clustering, {step}, {2 * HEADS} rows of {tokens} tokens",
            (Comparison(f"lsh_{step}", COMPILED, (PYTORCH,)),),
            partial(build_step, device, (2, HEADS), tokens, step),
        )


def build_total(device: torch.device, rows: tuple[int, int], tokens: int) -> Case:
    """Hash, group, average and hand back."""
    points, projections = _inputs(device, rows, tokens)
    formulations: dict[str, Formulation] = {
        PYTORCH: partial(cluster_by_ops, implementation="pytorch"),
        SHIFT_SUM: cluster_by_sorting,
        UNIQUE: cluster_by_unique,
        MATRIX_KEYS: cluster_by_matrix_keys,
    }
    reason = library.missing_reason(device)
    if not reason:
        formulations = {COMPILED: partial(cluster_by_ops, implementation="compiled")} | formulations
    keys = hash_keys(points, projections)
    clusters = group_by_key(keys)
    steps = (_bytes_of_step(step, points, clusters) for step in STEPS)
    return Case(
        contenders={
            name: _contender(formulation, points, projections, name in (COMPILED, PYTORCH))
            for name, formulation in formulations.items()
        },
        exact=lambda: [_exactly(points, projections)],
        tolerance=_TOLERANCE,
        compulsory_bytes=sum(steps),
        missing={COMPILED: reason} if reason else {},
    )


def _contender(
    formulation: Formulation, points: Tensor, projections: HashProjections, ours: bool
) -> Contender:
    run = torch.no_grad()(partial(formulation, points, projections))
    return Contender(run, lambda: [run()], ours)


STEPS = ("hash", "group", "mean", "broadcast")


def build_step(device: torch.device, rows: tuple[int, int], tokens: int, step: str) -> Case:
    """One of the four steps, compiled and in PyTorch."""
    points, projections = _inputs(device, rows, tokens)
    reason = library.missing_reason(device)
    implementations = {PYTORCH: "pytorch"} if reason else {COMPILED: "compiled", PYTORCH: "pytorch"}
    clusters = group_by_key(hash_keys(points, projections))
    means = cluster_mean(points, clusters.ids, clusters.counts)
    keys = hash_keys(points, projections, implementation="pytorch")
    runs: dict[str, Callable[[str], Tensor]] = {
        "hash": lambda choice: hash_keys(points, projections, implementation=choice),
        "group": lambda choice: group_by_key(keys, implementation=choice).ids,
        "mean": lambda choice: cluster_mean(
            points, clusters.ids, clusters.counts, implementation=choice
        ),
        "broadcast": lambda choice: cluster_broadcast(means, clusters.ids, implementation=choice),
    }
    run = torch.no_grad()(runs[step])
    return Case(
        contenders={
            name: Contender(partial(run, choice), partial(_as_list, run, choice))
            for name, choice in implementations.items()
        },
        exact=lambda: [_exact_step(step, points, projections, clusters)],
        tolerance=_TOLERANCE,
        compulsory_bytes=_bytes_of_step(step, points, clusters),
        missing={COMPILED: reason} if reason else {},
    )


def _as_list(run: Callable[[str], Tensor], choice: str) -> list[Tensor]:
    return [run(choice)]


def _exact_step(
    step: str, points: Tensor, projections: HashProjections, clusters: ClusterAssignment
) -> Tensor:
    """Integers of PyTorch's path in float64, which float64 may round; the rest in float64."""
    exact = points.double()
    directions, bias = projections.directions.double(), projections.bias.double()
    in_float64 = HashProjections(directions, bias, projections.width, projections.multipliers)
    keys = hash_keys(exact, in_float64, implementation="pytorch")
    if step == "hash":
        return keys.double()
    assigned = group_by_key(keys, implementation="pytorch")
    if step == "group":
        return assigned.ids.double()
    means = cluster_mean(exact, assigned.ids, clusters.counts, implementation="pytorch")
    if step == "mean":
        return means
    return cluster_broadcast(means, assigned.ids, implementation="pytorch")


def _bytes_of_step(step: str, points: Tensor, clusters: ClusterAssignment) -> int:
    """Inputs and outputs of a step, once each."""
    of_points = points.numel() * points.element_size()
    of_keys = clusters.ids.numel() * clusters.ids.element_size()
    of_counts = clusters.counts.numel() * clusters.counts.element_size()
    of_means = clusters.counts.numel() * points.shape[-1] * points.element_size()
    return {
        "hash": of_points + of_keys,
        "group": of_keys + of_keys + of_counts,
        "mean": of_points + of_keys + of_counts + of_means,
        "broadcast": of_means + of_keys + of_points,
    }[step]
