"""The host emulation of the CUDA grid does what CUDA documents, and sees what it is for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.cuda_emulation import Driver, MisuseError, compile_driver, tensor_from


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return compile_driver("grid_driver", tmp_path_factory.mktemp("grid"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_barriers_shuffles_and_shared_memory(grid: Driver, seed: int) -> None:
    numbers = torch.randint(-1000, 1000, (1000,), dtype=torch.int32)
    results = grid("sum_blocks", {"numbers": numbers, "seed": seed})
    expected = torch.stack([block.sum() for block in numbers.split(96)]).int()
    assert tensor_from(results["sums"], (11,), torch.int32).equal(expected)


@pytest.mark.parametrize("seed", [0, 3])
def test_operations_of_a_warp(grid: Driver, seed: int) -> None:
    content = grid("operate_warps", {"seed": seed})["results"]
    results = tensor_from(content, (2, 32, 8), torch.int32)
    assert results[0].equal(results[1])
    for lane, row in enumerate(results[0].tolist()):
        half = range(16) if lane < 16 else range(16, 32)
        assert row[0] == lane // 8 * 8 + 3  # lane 3 of each eight
        assert row[1] == lane ^ 5
        assert row[2] == (lane - 2 if lane % 4 >= 2 else lane)
        assert row[3] == _as_int32(sum(1 << i for i in half if i % 3 == 0))
        assert row[4] == (lane >= 16)
        assert row[5] == (lane < 16)
        assert row[6] == _as_int32(sum(1 << i for i in range(32) if i % 7 == lane % 7))
        assert row[7] == sum(half)


def _as_int32(bits: int) -> int:
    return bits - (1 << 32) if bits >= 1 << 31 else bits


def _rotate(grid: Driver, *, barrier: bool, seed: int, shared_bytes: int = 4 * 48) -> Tensor:
    inputs = {"numbers": torch.arange(48, dtype=torch.int32), "seed": seed}
    results = grid(
        "rotate_numbers", {**inputs, "barrier": int(barrier), "shared_bytes": shared_bytes}
    )
    return tensor_from(results["numbers"], (48,), torch.int32)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_missing_barrier_is_seen(grid: Driver, seed: int) -> None:
    rotated = torch.arange(48, dtype=torch.int32).roll(-1)
    assert _rotate(grid, barrier=True, seed=seed).equal(rotated)
    without = _rotate(grid, barrier=False, seed=seed)
    assert not without.equal(rotated)
    assert without.eq(-1).any()  # shared memory that nobody had written yet


def test_dynamic_shared_memory_ends_where_it_ends(grid: Driver) -> None:
    with pytest.raises(MisuseError, match="heap-buffer-overflow"):
        _rotate(grid, barrier=True, seed=0, shared_bytes=4 * 47)
    with pytest.raises(MisuseError, match="invalid argument or launch configuration"):
        _rotate(grid, barrier=True, seed=0, shared_bytes=49 * 1024)


def test_the_order_of_threads_follows_the_seed(grid: Driver) -> None:
    firsts = []
    for seed in (0, 1, 2, 3, 3):
        results = grid("arrive", {"seed": seed})
        firsts.append(int(tensor_from(results["first"], (1,), torch.int32)))
        assert int(tensor_from(results["count"], (1,), torch.int32)) == 4 * 64
        assert float(tensor_from(results["sum"], (1,), torch.float32)) == 128
    assert firsts[0] == 0
    assert len(set(firsts)) > 2
    assert firsts[-1] == firsts[-2]


@pytest.mark.parametrize(
    ("kind", "threads", "message"),
    [
        (0, 64, None),  # a whole warp alone at its barrier is fine
        (1, 32, "deadlock"),
        (2, 32, "does not name its caller"),
        (3, 32, "takes no part"),
        (4, 32, "heap-buffer-overflow"),
        (5, 32, "misaligned address"),
        (6, 32, "different warp operations"),
        (7, 32, "deadlock"),
        (1, 2048, "invalid argument or launch configuration"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_misuse(grid: Driver, kind: int, threads: int, message: str | None, seed: int) -> None:
    inputs = {"kind": kind, "threads": threads, "seed": seed}
    if message is None:
        grid("misuse", inputs)
        return
    with pytest.raises(MisuseError, match=message):
        grid("misuse", inputs)


def test_half_precision_conversions_equal_pytorchs(grid: Driver) -> None:
    """Every half, the numbers in the middle of two halves, and numbers close to those."""
    bits = torch.arange(0x7C00, dtype=torch.int16)
    halves = bits.view(torch.float16).float()
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(halves.tolist())])
    near = torch.cat([middles.nextafter(torch.tensor(sign * torch.inf)) for sign in (-1, 1)])
    extremes = torch.tensor([65519.9, 65520.0, 1e30, torch.inf, 2.0**-25, 2.0**-26, 1e-44, 0.0])
    positive = torch.cat([halves, middles, near, extremes, torch.randn(1000).abs() * 1e4])
    numbers = torch.cat([positive, -positive])
    results = grid("round_numbers", {"numbers": numbers})
    for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
        ours = tensor_from(results[name], numbers.shape, dtype)
        assert ours.view(torch.int16).equal(numbers.to(dtype).view(torch.int16)), name
    widened = tensor_from(results["widened"], numbers.shape, torch.float32)
    assert widened.equal(numbers.half().float())
    nan = grid("round_numbers", {"numbers": torch.tensor([torch.nan])})
    assert tensor_from(nan["half"], (1,), torch.float16).isnan()
    assert tensor_from(nan["bfloat16"], (1,), torch.bfloat16).isnan()
