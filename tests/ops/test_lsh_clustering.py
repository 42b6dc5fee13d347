"""LSH clustering: plain PyTorch and the compiled operators against loops.

The numbers of the official implementation are compared in `tests/golden_families`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from efficient_detr.ops import library
from efficient_detr.ops.lsh_clustering import (
    HashProjections,
    cluster_broadcast,
    cluster_mean,
    cluster_tokens,
    distinct_multipliers,
    draw_projections,
    group_by_key,
    hash_keys,
    published_multipliers,
)
from efficient_detr.ops.lsh_clustering_library import OPERATORS

MISSING = library.missing_reason(torch.device("cpu"))
needs_compiled = pytest.mark.skipif(bool(MISSING), reason=MISSING)
both = pytest.mark.parametrize(
    "implementation", ["pytorch", pytest.param("compiled", marks=needs_compiled)]
)


# Keys --------------------------------------------------------------------------------------------


def exact_inputs(
    images: int, heads: int, tokens: int, channels: int, rounds: int
) -> tuple[Tensor, HashProjections]:
    """Small multiples of 1/8: float32 adds and multiplies them exactly, in whatever order."""
    points = torch.randint(-9, 10, (images, heads, tokens, channels)) / 8
    directions = torch.randint(-9, 10, (channels, rounds)) / 8
    bias = torch.randint(0, 8, (rounds,)) / 8
    return points, HashProjections(directions, bias, 0.25, distinct_multipliers(rounds))


def literal_keys(points: Tensor, projections: HashProjections) -> Tensor:
    """The definition in Python's integers, a token at a time."""
    keys = []
    for point in points.flatten(0, 2).double():
        key = 0
        for t, multiplier in enumerate(projections.multipliers.tolist()):
            position = float(point @ projections.directions[:, t].double() + projections.bias[t])
            key += math.floor(position / projections.width) * multiplier
        key %= 1 << 64
        keys.append(key - (1 << 64) if key >> 63 else key)
    return torch.tensor(keys, dtype=torch.int64).reshape(points.shape[:3])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("images", "heads", "tokens", "channels", "rounds"),
    [
        (1, 1, 1, 1, 1),
        (2, 3, 7, 5, 4),
        (1, 2, 101, 32, 32),
        (1, 1, 50, 33, 40),
        (2, 1, 13, 64, 20),
        (1, 2, 3, 0, 5),
        (2, 2, 0, 8, 3),
        (1, 1, 4, 8, 0),
    ],
)
def test_keys_equal_the_definition(
    implementation: str,
    dtype: torch.dtype,
    images: int,
    heads: int,
    tokens: int,
    channels: int,
    rounds: int,
) -> None:
    points, projections = exact_inputs(images, heads, tokens, channels, rounds)
    keys = hash_keys(points.to(dtype), projections, implementation=implementation)
    assert keys.equal(literal_keys(points, projections))


@both
def test_keys_of_views(implementation: str) -> None:
    points, projections = exact_inputs(2, 3, 20, 8, 9)
    expected = hash_keys(points, projections, implementation=implementation)
    merged = points.transpose(1, 2).contiguous()  # (B, N, H, D), as attention has it
    channels_first = points.transpose(2, 3).contiguous()
    wider = F.pad(points, (3, 2))
    for view in (merged.transpose(1, 2), channels_first.transpose(2, 3), wider[..., 3:-2]):
        assert not view.is_contiguous()
        assert hash_keys(view, projections, implementation=implementation).equal(expected)


def test_multipliers_are_those_of_splitmix64() -> None:
    """The first outputs for seed 0 are e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f."""
    expected = [0xE220A8397B1DCDAF - (1 << 64), 0x6E789E6AA1B965F5, 0x06C45D188009454F]
    assert distinct_multipliers(3).tolist() == expected
    multipliers = distinct_multipliers(1000)
    assert multipliers.remainder(2).eq(1).all()
    assert multipliers.unique().numel() == 1000


def test_published_multipliers() -> None:
    assert published_multipliers(4).tolist() == [1, 4, 16, 64]
    assert published_multipliers(32)[-1] == 1 << 62
    with pytest.raises(ValueError, match="at most 32 rounds"):
        published_multipliers(33)


@both
def test_published_keys_mix_cells_that_carry(implementation: str) -> None:
    """Cells (4, 0) and (0, 1) both make 4 + 0 = 0 + 4 * 1."""
    points = torch.tensor([[4.5, 0.5], [0.5, 1.5]])[None, None]
    projections = HashProjections(torch.eye(2), torch.zeros(2), 1.0, published_multipliers(2))
    keys = hash_keys(points, projections, implementation=implementation)
    assert keys.flatten().tolist() == [4, 4]
    distinct = replace(projections, multipliers=distinct_multipliers(2))
    keys = hash_keys(points, distinct, implementation=implementation)
    assert keys[0, 0, 0] != keys[0, 0, 1]


@both
def test_cells_far_out(implementation: str) -> None:
    """Cells end at 2^30 on either side; NaN is in the lowest, and so is what makes a NaN."""
    inf, nan, limit = math.inf, math.nan, 1 << 30
    cells = {
        -0.5: -1,
        -1.0: -1,
        3.75: 3,
        2.0**29: 1 << 29,
        2.0**30: limit,
        2.0**31: limit,
        3e38: limit,
        inf: limit,
        -(2.0**30): -limit,
        -(2.0**31): -limit,
        -inf: -limit,
        nan: -limit,
    }
    points = torch.tensor(list(cells)).reshape(1, 1, -1, 1)
    projections = HashProjections(torch.ones(1, 1), torch.zeros(1), 1.0, torch.tensor([3]))
    for dtype in (torch.float32, torch.float64):
        keys = hash_keys(points.to(dtype), projections, implementation=implementation)
        assert keys.flatten().tolist() == [3 * cell for cell in cells.values()]


@both
def test_not_finite_tokens_keep_to_themselves(implementation: str) -> None:
    points = torch.randn(1, 1, 12, 8)
    points[0, 0, 3, 5] = math.nan
    points[0, 0, 7, 0] = math.nan
    points[0, 0, 9] = torch.tensor([math.inf, -math.inf] * 4)  # differences: NaN
    projections = draw_projections(8, 16)
    alone = cluster_tokens(points[:, :, [0, 1, 2]], projections, implementation=implementation)
    ids = cluster_tokens(points, projections, implementation=implementation).ids[0, 0]
    assert ids[3] == ids[7]
    finite = [n for n in range(12) if n not in (3, 7, 9)]
    assert not set(ids[[3, 7, 9]].tolist()) & set(ids[finite].tolist())
    assert ids[:3].equal(alone.ids[0, 0])


@both
def test_collisions_follow_the_theory(implementation: str) -> None:
    """Biases in U(0, w): p(c) = 1 - 2 Phi(-w/c) - 2 c / (sqrt(2 pi) w) (1 - exp(-w^2 / (2 c^2))).

    At half a width: 1 - 2 * 0.02275 - 1 / sqrt(2 pi) * (1 - e^-2) = 0.6095; at a width 0.3687.
    """
    rounds, pairs = 40, 200
    projections = draw_projections(32, rounds, width=2.0, bias_range=2.0)
    start = torch.randn(1, 1, pairs, 32)
    step = F.normalize(torch.randn(1, 1, pairs, 32), dim=-1)
    for distance, expected in ((0.5, 0.6095), (1.0, 0.3687)):
        both_ends = torch.cat([start, start + distance * 2.0 * step], dim=2)
        equal = 0
        for t in range(rounds):
            one = HashProjections(
                projections.directions[:, t : t + 1],
                projections.bias[t : t + 1],
                2.0,
                torch.ones(1, dtype=torch.int64),
            )
            keys = hash_keys(both_ends, one, implementation=implementation)[0, 0]
            equal += int((keys[:pairs] == keys[pairs:]).sum())
        assert equal / (rounds * pairs) == pytest.approx(expected, abs=0.03)


def test_projections_are_reproducible() -> None:
    drawn = draw_projections(8, 5, width=3.0, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    assert drawn.directions.equal(torch.randn(8, 5, generator=generator))
    assert drawn.bias.equal(torch.rand(5, generator=generator))
    assert drawn.width == 3.0 and drawn.multipliers.equal(distinct_multipliers(5))
    wide = draw_projections(8, 500, bias_range=3.0)
    assert wide.bias.min() < 0.2 and 2.8 < wide.bias.max() < 3.0


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_hashed_in_float32(implementation: str, dtype: torch.dtype) -> None:
    points = torch.randn(2, 2, 50, 16).to(dtype)
    projections = draw_projections(16, 12)
    expected = hash_keys(points.float(), projections, implementation=implementation)
    assert hash_keys(points, projections, implementation=implementation).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert hash_keys(points, projections, implementation=implementation).equal(expected)


# Groups ------------------------------------------------------------------------------------------


def literal_groups(keys: Tensor, padding: Tensor | None, capacity: int | None) -> list[list[int]]:
    rows = []
    heads = keys.shape[1]
    for row, numbers in enumerate(keys.flatten(0, 1).tolist()):
        ids: dict[int, int] = {}
        skip = padding[row // heads].tolist() if padding is not None else [False] * len(numbers)
        clusters = [
            -1 if skipped else ids.setdefault(key, len(ids))
            for key, skipped in zip(numbers, skip, strict=True)
        ]
        rows.append([c % capacity if capacity and c >= capacity else c for c in clusters])
    return rows


LARGEST = (1 << 63) - 1


@both
@pytest.mark.parametrize("capacity", [None, 1, 3, 1000])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("tokens", "different"), [(1, 1), (40, 1), (40, 4), (333, 90), (64, LARGEST)]
)
def test_groups_equal_the_definition(
    implementation: str, capacity: int | None, padded: bool, tokens: int, different: int
) -> None:
    keys = torch.randint(-different, different, (2, 3, tokens))
    padding = torch.rand(2, tokens) < 0.3 if padded else None
    groups = group_by_key(keys, padding, capacity=capacity, implementation=implementation)
    expected = literal_groups(keys, padding, capacity)
    assert groups.ids.flatten(0, 1).tolist() == expected
    unlimited = literal_groups(keys, padding, None)
    assert groups.num_clusters.flatten().tolist() == [max(ids) + 1 for ids in unlimited]
    clusters = capacity or max(1, int(groups.num_clusters.max()))
    assert groups.counts.shape == (2, 3, clusters)
    for counts, ids in zip(groups.counts.flatten(0, 1).tolist(), expected, strict=True):
        assert counts == [ids.count(cluster) for cluster in range(clusters)]
    for tensor in (groups.ids, groups.counts, groups.num_clusters):
        assert tensor.dtype == torch.int64


@both
def test_keys_that_meet_in_a_hash_table(implementation: str) -> None:
    """Multiples of high powers of two, and neighbours, as the published keys have them."""
    keys = torch.cat([torch.arange(500) << shift for shift in (0, 20, 40, 54)])
    keys = torch.cat([keys, keys.flip(0), -keys])[None, None]
    groups = group_by_key(keys, implementation=implementation)
    assert groups.ids.flatten(0, 1).tolist() == literal_groups(keys, None, None)


@both
def test_groups_of_nothing(implementation: str) -> None:
    everything = torch.ones(2, 5, dtype=torch.bool)
    groups = group_by_key(torch.randint(0, 2, (2, 3, 5)), everything, implementation=implementation)
    assert groups.ids.eq(-1).all()
    assert groups.counts.tolist() == [[[0]] * 3] * 2
    assert groups.num_clusters.eq(0).all()
    for shape in ((2, 3, 0), (0, 3, 4), (2, 0, 4)):
        keys = torch.zeros(shape, dtype=torch.int64)
        padding = torch.zeros(shape[0], shape[2], dtype=torch.bool)
        for mask in (None, padding):
            groups = group_by_key(keys, mask, implementation=implementation)
            assert groups.ids.shape == shape
            assert groups.counts.shape == (*shape[:2], 1)
            assert groups.num_clusters.shape == shape[:2]


@both
def test_padding_is_excluded(implementation: str) -> None:
    """Real tokens get the clusters and prototypes that they have without the padding."""
    points, projections = torch.randn(1, 2, 30, 8), draw_projections(8, 4)
    chosen = {"implementation": implementation}
    alone = cluster_tokens(points, projections, **chosen)
    padded = torch.cat([points[:, :, :10], torch.randn(1, 2, 7, 8), points[:, :, 10:]], dim=2)
    mask = torch.zeros(1, 37, dtype=torch.bool)
    mask[:, 10:17] = True
    together = cluster_tokens(padded, projections, mask, **chosen)
    real = ~mask[0]
    assert together.ids[:, :, real].equal(alone.ids)
    assert together.ids[:, :, ~real].eq(-1).all()
    assert together.counts.equal(alone.counts)
    means = [
        cluster_mean(x, a.ids, a.counts, **chosen) for x, a in ((padded, together), (points, alone))
    ]
    assert means[0].equal(means[1])
    assert cluster_broadcast(means[0], together.ids, **chosen)[:, :, ~real].eq(0).all()


# Means and copies --------------------------------------------------------------------------------


def random_clusters(tokens: int, clusters: int) -> tuple[Tensor, Tensor]:
    """Ids and counts; one cluster is empty, some tokens have no cluster or an impossible one."""
    ids = torch.randint(-1, clusters + 1, (2, 3, tokens))
    ids[ids == 1] = 0
    counts = torch.stack([ids.eq(c).sum(-1) for c in range(clusters)], dim=-1)
    return ids, counts


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 5, 8, 32, 37])
def test_means_and_copies_equal_the_definition(
    implementation: str, dtype: torch.dtype, channels: int
) -> None:
    clusters, tokens = 6, 50
    points = torch.randn(2, 3, tokens, channels, dtype=dtype)
    ids, counts = random_clusters(tokens, clusters)
    means = cluster_mean(points, ids, counts, implementation=implementation)
    copies = cluster_broadcast(means, ids, implementation=implementation)
    assert means.shape == (2, 3, clusters, channels) and means.dtype == dtype
    assert copies.shape == points.shape and copies.dtype == dtype
    for b in range(2):
        for h in range(3):
            for c in range(clusters):
                members = points[b, h, ids[b, h] == c]
                expected = members.mean(0) if len(members) else torch.zeros(channels, dtype=dtype)
                torch.testing.assert_close(means[b, h, c], expected)
            for n, c in enumerate(ids[b, h].tolist()):
                own = means[b, h, c] if 0 <= c < clusters else torch.zeros(channels, dtype=dtype)
                assert copies[b, h, n].equal(own)


@both
def test_means_and_copies_of_views(implementation: str) -> None:
    ids, counts = random_clusters(20, 4)
    points = torch.randn(2, 20, 3, 8).transpose(1, 2)
    prototypes = torch.randn(2, 4, 3, 8).transpose(1, 2)
    chosen = {"implementation": implementation}
    assert cluster_mean(points, ids, counts, **chosen).equal(
        cluster_mean(points.contiguous(), ids, counts, **chosen)
    )
    copies = cluster_broadcast(prototypes, ids, **chosen)
    assert copies.equal(cluster_broadcast(prototypes.contiguous(), ids, **chosen))
    if implementation == "compiled":
        assert copies.transpose(1, 2).is_contiguous()


@both
def test_gradients(implementation: str) -> None:
    ids, counts = random_clusters(9, 4)
    points = torch.randn(2, 3, 9, 2, dtype=torch.float64, requires_grad=True)
    prototypes = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)

    def mean(x: Tensor) -> Tensor:
        return cluster_mean(x, ids, counts, implementation=implementation).square()

    def copy(x: Tensor) -> Tensor:
        return cluster_broadcast(x, ids, implementation=implementation).square()

    for function, inputs in ((mean, points), (copy, prototypes)):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@both
def test_hand_derived_gradients(implementation: str) -> None:
    """Tokens 1 2 6 in clusters 0 1 0: means 3.5 and 2, copied 3.5 2 3.5.

    With the weights 1 10 100 on the copies, the prototypes get 101 and 10, the tokens 50.5 10 50.5.
    """
    points = torch.tensor([1.0, 2, 6]).reshape(1, 1, 3, 1).requires_grad_()
    ids, counts = torch.tensor([[[0, 1, 0]]]), torch.tensor([[[2, 1]]])
    means = cluster_mean(points, ids, counts, implementation=implementation)
    copies = cluster_broadcast(means, ids, implementation=implementation)
    assert copies.flatten().tolist() == [3.5, 2, 3.5]
    weights = torch.tensor([1.0, 10, 100]).reshape(1, 1, 3, 1)
    gradients = torch.autograd.grad((copies * weights).sum(), [means, points])
    assert gradients[0].flatten().tolist() == [101, 10]
    assert gradients[1].flatten().tolist() == [50.5, 10, 50.5]


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_in_float32(implementation: str, dtype: torch.dtype) -> None:
    """4096 times 1 + 1/64: in half precision such a sum stops growing half-way."""
    points = torch.full((1, 1, 4096, 3), 1 + 1 / 64, dtype=dtype)
    ids = torch.zeros(1, 1, 4096, dtype=torch.int64)
    mean = cluster_mean(points, ids, torch.tensor([[[4096]]]), implementation=implementation)
    assert mean.dtype == dtype and mean.eq(1 + 1 / 64).all()
    copies = cluster_broadcast(mean, ids, implementation=implementation)
    assert copies.dtype == dtype and copies.equal(points)


@both
def test_everything_of_nothing(implementation: str) -> None:
    projections = draw_projections(8, 4)
    for shape in ((2, 3, 0, 8), (0, 3, 4, 8)):
        points = torch.zeros(shape, requires_grad=True)
        clusters = cluster_tokens(points, projections, implementation=implementation)
        means = cluster_mean(points, clusters.ids, clusters.counts, implementation=implementation)
        assert means.shape == (*shape[:2], 1, 8) and means.eq(0).all()
        copies = cluster_broadcast(means, clusters.ids, implementation=implementation)
        assert copies.shape == shape
        copies.sum().backward()
        assert points.grad is not None and points.grad.shape == shape


# Implementations against each other --------------------------------------------------------------


def run_all(
    points: Tensor, projections: HashProjections, padding: Tensor | None, implementation: str
) -> tuple[Tensor, ...]:
    chosen = {"implementation": implementation}
    keys = hash_keys(points, projections, **chosen)
    clusters = group_by_key(keys, padding, **chosen)
    means = cluster_mean(points, clusters.ids, clusters.counts, **chosen)
    copies = cluster_broadcast(means, clusters.ids, **chosen)
    return keys, clusters.ids, clusters.counts, clusters.num_clusters, means, copies


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_equals_pytorch(dtype: torch.dtype) -> None:
    points = torch.randn(2, 4, 700, 32, dtype=dtype)
    projections = draw_projections(32, 7)
    padding = torch.rand(2, 700) < 0.2
    ours = run_all(points, projections, padding, "compiled")
    # Differently rounded sums can put a token on the border of two cells into either: count those.
    keys = hash_keys(points, projections, implementation="pytorch")
    assert (ours[0] != keys).sum() <= 3
    theirs = group_by_key(ours[0], padding, implementation="pytorch")
    assert ours[1].equal(theirs.ids) and ours[2].equal(theirs.counts)
    assert ours[3].equal(theirs.num_clusters)
    means = cluster_mean(points, theirs.ids, theirs.counts, implementation="pytorch")
    torch.testing.assert_close(ours[4], means)
    copies = cluster_broadcast(ours[4], theirs.ids, implementation="pytorch")
    assert ours[5].equal(copies)


@both
def test_threads_make_no_difference(implementation: str) -> None:
    points, projections = torch.randn(3, 2, 900, 16), draw_projections(16, 6)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run_all(points, projections, None, implementation))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@needs_compiled
def test_registrations() -> None:
    """Schemas, shapes under fake tensors, autograd and AOT dispatch, by torch's own checks."""
    points = torch.randn(2, 3, 20, 8)
    projections = draw_projections(8, 5)
    hashing = (points, projections.directions, projections.bias, 8.0, projections.multipliers)
    torch.library.opcheck(OPERATORS.lsh_hash, hashing)
    keys = torch.randint(0, 5, (2, 3, 20))
    padding = torch.rand(2, 20) < 0.3
    for mask in (None, padding):
        for capacity in (None, 4):
            torch.library.opcheck(OPERATORS.lsh_group, (keys, mask, capacity))
    ids, counts = random_clusters(20, 4)
    prototypes = torch.randn(2, 3, 4, 8, requires_grad=True)
    points.requires_grad_()
    for some_counts in (None, counts):
        torch.library.opcheck(OPERATORS.cluster_reduce, (points, ids, 4, some_counts))
        torch.library.opcheck(OPERATORS.cluster_broadcast, (prototypes, ids, some_counts))


@needs_compiled
def test_autocast_of_the_operators() -> None:
    """Called directly, without the casts of the Python functions."""
    ids, counts = random_clusters(20, 4)
    points = torch.randn(2, 3, 20, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        means = OPERATORS.cluster_reduce(points, ids, 4, counts)
        copies = OPERATORS.cluster_broadcast(means.bfloat16(), ids, None)
    assert means.dtype == copies.dtype == torch.float32
    assert means.equal(OPERATORS.cluster_reduce(points.float(), ids, 4, counts))


@needs_compiled
def test_flops_are_counted() -> None:
    """Hashing: 2 * 2 * 3 * 20 * 8 * 5 = 9600; means: 2 * 3 * 20 * 8 = 960 additions."""
    points, projections = torch.randn(2, 3, 20, 8), draw_projections(8, 5)
    with FlopCounterMode(display=False) as counter:
        run_all(points, projections, None, "compiled")
    assert counter.get_total_flops() == 9600 + 960


# torch.compile -----------------------------------------------------------------------------------


def clustered(points: Tensor, projections: HashProjections, capacity: int | None) -> Tensor:
    """What attention does with clusters, with a square instead of the attention."""
    clusters = cluster_tokens(points, projections, capacity=capacity)
    means = cluster_mean(points, clusters.ids, clusters.counts)
    return cluster_broadcast(means.square(), clusters.ids)


@pytest.mark.parametrize(
    ("implementation", "capacity"),
    [
        ("pytorch", 6),
        pytest.param("compiled", 6, marks=needs_compiled),
        pytest.param("compiled", None, marks=needs_compiled),
    ],
)
def test_torch_compile(
    implementation: str, capacity: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, implementation)
    torch._dynamo.reset()
    patch = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    compiled = torch.compile(clustered, fullgraph=True, backend="aot_eager")
    projections = draw_projections(8, 3)
    for seed in range(2):
        torch.manual_seed(seed)
        points = torch.randn(2, 2, 40, 8, requires_grad=True)
        with patch:
            output = compiled(points, projections, capacity)
        expected = clustered(points, projections, capacity)
        torch.testing.assert_close(output, expected)
        gradients = [torch.autograd.grad(x.sum(), points)[0] for x in (output, expected)]
        torch.testing.assert_close(*gradients)


# On a GPU ----------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> torch.device:
    device = torch.device("cuda")
    if reason := library.missing_reason(device):
        pytest.skip(reason)
    return device


def on(device: torch.device, projections: HashProjections) -> HashProjections:
    names = ("directions", "bias", "multipliers")
    return replace(projections, **{name: getattr(projections, name).to(device) for name in names})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "channels", "rounds"), [(1, 32, 4), (1050, 32, 6), (4200, 37, 20), (30000, 16, 3)]
)
def test_gpu_equals_cpu(
    gpu: torch.device, dtype: torch.dtype, tokens: int, channels: int, rounds: int
) -> None:
    points, projections = exact_inputs(2, 3, tokens, channels, rounds)
    points = points.to(dtype)
    padding = torch.rand(2, tokens) < 0.2
    expected = run_all(points, projections, padding, "pytorch")
    merged = points.transpose(1, 2).contiguous().to(gpu).transpose(1, 2)
    for view in (points.to(gpu), merged):
        results = run_all(view, on(gpu, projections), padding.to(gpu), "compiled")
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs)
        again = run_all(view, on(gpu, projections), padding.to(gpu), "compiled")
        assert all(a.equal(b) for a, b in zip(results, again, strict=True))


@pytest.mark.gpu
def test_gpu_gradients(gpu: torch.device) -> None:
    ids, counts = (x.to(gpu) for x in random_clusters(9, 4))
    points = torch.randn(2, 3, 9, 2, dtype=torch.float64, device=gpu, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        means = cluster_mean(x, ids, counts, implementation="compiled")
        return cluster_broadcast(means.square(), ids, implementation="compiled")

    assert torch.autograd.gradcheck(function, points)
    assert torch.autograd.gradgradcheck(function, points)


@pytest.mark.gpu
def test_gpu_does_not_wait_with_a_capacity(gpu: torch.device) -> None:
    points, projections = exact_inputs(2, 3, 500, 32, 8)
    points, projections = points.to(gpu), on(gpu, projections)
    upstream = torch.randn_like(points)
    points.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clusters = cluster_tokens(points, projections, capacity=100, implementation="compiled")
        means = cluster_mean(points, clusters.ids, clusters.counts, implementation="compiled")
        copies = cluster_broadcast(means, clusters.ids, implementation="compiled")
        copies.backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = cluster_tokens(points.cpu(), on(torch.device("cpu"), projections), capacity=100)
    assert clusters.ids.cpu().equal(expected.ids)


# Bad input ---------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    points, projections = torch.randn(2, 3, 10, 8), draw_projections(8, 5)
    with pytest.raises(ValueError, match=r"directions \(D, T\)"):
        hash_keys(points[..., :7], projections)
    with pytest.raises(ValueError, match=r"must be \(5,\)"):
        hash_keys(points, replace(projections, multipliers=distinct_multipliers(4)))
    for width in (0.0, -1.0, 1e-45, math.inf, math.nan):
        with pytest.raises(ValueError, match="between 1e-06 and 1000000.0, but is"):
            hash_keys(points, replace(projections, width=width))
    with pytest.raises(ValueError, match="multipliers must be int64"):
        hash_keys(points, replace(projections, multipliers=torch.ones(5)))
    with pytest.raises(ValueError, match="points must be floating"):
        hash_keys(points.int(), projections)
    keys = hash_keys(points, projections)
    with pytest.raises(ValueError, match="keys must be int64"):
        group_by_key(keys.int())
    with pytest.raises(ValueError, match="one entry a token"):
        group_by_key(keys, torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="one entry a token"):
        group_by_key(keys, torch.zeros(2, 10))
    with pytest.raises(ValueError, match="capacity must be an integer of at least 1"):
        group_by_key(keys, capacity=0)
    clusters = group_by_key(keys)
    with pytest.raises(ValueError, match="differ in B, H or N"):
        cluster_mean(points[:, :, :9], clusters.ids, clusters.counts)
    with pytest.raises(ValueError, match="ids must be int64"):
        cluster_broadcast(points, clusters.ids.int())
    with pytest.raises(ValueError, match="must be floating"):
        cluster_mean(points.int(), clusters.ids, clusters.counts)
    with pytest.raises(ValueError, match="counts must be"):
        cluster_mean(points, clusters.ids, clusters.counts[:1])
    with pytest.raises(ValueError, match=r"ids \(B, H, N\)"):
        cluster_broadcast(points, clusters.ids[:1])
