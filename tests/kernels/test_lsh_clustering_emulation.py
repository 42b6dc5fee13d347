"""The CUDA kernels of LSH clustering on an emulated thread grid, against PyTorch.

Everything but the GPU is as it will be. The address sanitizer watches the memory; seeds other than
0 shuffle the order of blocks, threads and atomic operations.
"""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import Driver, compile_driver, tensor_from
from torch import Tensor

from efficient_detr.ops import lsh_clustering_pytorch as in_pytorch
from efficient_detr.ops.lsh_clustering import distinct_multipliers

LARGEST = (1 << 63) - 1
REALS = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return compile_driver("lsh_clustering_driver", tmp_path_factory.mktemp("clustering"))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def laid_out(tensor: Tensor, merged: bool) -> Tensor:
    """The (B, H, N, D) tensor as the driver wants it in memory."""
    return tensor.transpose(1, 2).contiguous() if merged else tensor.contiguous()


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("images", "heads", "tokens", "channels", "rounds"),
    [(1, 1, 1, 1, 1), (2, 2, 131, 32, 20), (1, 3, 40, 37, 33), (1, 1, 7, 0, 3), (2, 2, 5, 8, 0)],
)
def test_hash(
    driver: Driver,
    dtype: torch.dtype,
    merged: bool,
    images: int,
    heads: int,
    tokens: int,
    channels: int,
    rounds: int,
) -> None:
    """Inputs are small multiples of 1/8, so that sums are exact and keys must be equal."""
    points = torch.randint(-9, 10, (images, heads, tokens, channels)).to(dtype) / 8
    points[..., -1:, :] *= 2.0**40  # far outside
    points[..., :1, -1:] = torch.nan
    directions = torch.randint(-9, 10, (channels, rounds)).to(dtype) / 8
    bias = torch.randint(0, 8, (rounds,)).to(dtype) / 8
    multipliers = distinct_multipliers(rounds)
    results = driver(
        f"hash_{name_of(dtype)}",
        {
            "images": images,
            "heads": heads,
            "tokens": tokens,
            "channels": channels,
            "rounds": rounds,
            "merged": int(merged),
            "points": laid_out(points, merged),
            "directions": directions,
            "bias": bias,
            "width": torch.tensor([0.25], dtype=dtype),
            "multipliers": multipliers,
            "seed": 1,
        },
    )
    expected = in_pytorch.lsh_hash(points, directions, bias, 0.25, multipliers)
    assert tensor_from(results["keys"], expected.shape, torch.int64).equal(expected)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("capacity", [None, 5])
@pytest.mark.parametrize(
    ("tokens", "different", "padded"),
    [(1, 1, False), (40, 3, True), (97, LARGEST, False), (1100, 300, True), (64, 1, True)],
)
@pytest.mark.parametrize("in_shared_memory", [True, False])
def test_group(
    driver: Driver,
    seed: int,
    capacity: int | None,
    tokens: int,
    different: int,
    padded: bool,
    in_shared_memory: bool,
) -> None:
    keys = torch.randint(-different, different, (2, 2, tokens))
    padding = torch.rand(2, tokens) < 0.3 if padded else None
    if padding is not None and capacity is None:
        padding[1] = True
    inputs: dict[str, Tensor | int] = {
        "images": 2,
        "heads": 2,
        "tokens": tokens,
        "capacity": capacity or 0,
        "keys": keys,
        "shared_bytes": 227 * 1024 if in_shared_memory else 1024,
        "expect_workspace": int(not in_shared_memory),
        "seed": seed,
    }
    if padding is not None:
        inputs["padding"] = padding
    results = driver("group", inputs)
    ids, counts, num_clusters = in_pytorch.lsh_group(keys, padding, capacity)
    assert tensor_from(results["ids"], ids.shape, torch.int64).equal(ids)
    found = tensor_from(results["num_clusters"], num_clusters.shape, torch.int64)
    assert found.equal(num_clusters)
    assert tensor_from(results["counts"], counts.shape, torch.int64).equal(counts)


def test_the_limit_of_shared_memory_is_the_same_for_all_sizes(driver: Driver) -> None:
    """It belongs to the kernel: another thread may set it between ours and our launch."""
    limits = []
    for tokens in (1, 1100):
        sizes = {"images": 1, "heads": 1, "tokens": tokens, "capacity": 0}
        keys = torch.arange(tokens)
        results = driver(
            "group", {**sizes, "keys": keys, "shared_bytes": 64 * 1024, "expect_workspace": 0}
        )
        limits.append(int(tensor_from(results["shared_limit"], (1,), torch.int64)))
    assert limits == [63 * 1024, 63 * 1024]  # 1 KB is left for variables


def test_group_no_rows(driver: Driver) -> None:
    sizes = {"images": 0, "heads": 2, "tokens": 5, "capacity": 3}
    inputs = {**sizes, "keys": torch.empty(0), "shared_bytes": 1024, "expect_workspace": 0}
    assert driver("group", inputs)["counts"] == b""


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize(("counted", "merged"), [(False, True), (True, False)])
@pytest.mark.parametrize(
    ("heads", "tokens", "channels", "clusters"),
    [(1, 1, 1, 1), (3, 300, 8, 1), (2, 290, 40, 7), (1, 150, 32, 600), (2, 0, 5, 3)],
)
def test_reduce_and_broadcast(
    driver: Driver,
    dtype: torch.dtype,
    counted: bool,
    merged: bool,
    heads: int,
    tokens: int,
    channels: int,
    clusters: int,
) -> None:
    ids = torch.randint(-1, clusters + 1, (2, heads, tokens))
    counts = torch.stack([ids.eq(c).sum(-1) for c in range(clusters)], dim=-1) if counted else None
    points = torch.randn(2, heads, tokens, channels, dtype=dtype)
    prototypes = torch.randn(2, heads, clusters, channels, dtype=dtype)
    inputs: dict[str, Tensor | int] = {
        "images": 2,
        "heads": heads,
        "tokens": tokens,
        "channels": channels,
        "clusters": clusters,
        "merged": int(merged),
        "ids": ids,
        "points": laid_out(points, merged),
        "prototypes": laid_out(prototypes, merged),
    }
    if counts is not None:
        inputs["counts"] = counts
    reduced = [driver(f"reduce_{name_of(dtype)}", {**inputs, "seed": s}) for s in (0, 3)]
    assert reduced[0]["prototypes"] == reduced[1]["prototypes"], "depends on the order of threads"
    sums = tensor_from(reduced[0]["prototypes"], prototypes.shape, dtype)
    expected = in_pytorch.cluster_reduce(points, ids, clusters, counts)
    torch.testing.assert_close(sums, expected)

    content = driver(f"broadcast_{name_of(dtype)}", inputs)["output"]
    shape = (2, tokens, heads, channels) if merged else points.shape
    copies = tensor_from(content, shape, dtype)
    expected = in_pytorch.cluster_broadcast(prototypes, ids, counts)
    torch.testing.assert_close(copies, expected.transpose(1, 2) if merged else expected)


@pytest.mark.parametrize(
    ("images", "tokens", "clusters"), [(3, 150, 33), (3, 130, 400), (15, 3, 130)]
)
def test_many_clusters_of_many_rows(
    driver: Driver, images: int, tokens: int, clusters: int
) -> None:
    """Enough of them for blocks that take 4, 32 and 64 clusters."""
    ids = torch.randint(-1, clusters, (images, 20, tokens))
    points = torch.randn(images, 20, tokens, 2)
    inputs: dict[str, Tensor | int] = {
        "images": images,
        "heads": 20,
        "tokens": tokens,
        "channels": 2,
        "clusters": clusters,
        "merged": 0,
        "ids": ids,
        "points": points,
    }
    content = driver("reduce_float32", inputs)["prototypes"]
    expected = in_pytorch.cluster_reduce(points, ids, clusters, None)
    torch.testing.assert_close(tensor_from(content, expected.shape, torch.float32), expected)
