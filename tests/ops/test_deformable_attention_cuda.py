"""What only a GPU can show of the compiled deformable attention.

All kernels at real sizes, streams, devices, alignment, determinism. Everything else is tested on
each device in the other files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.ops import (
    fused_multi_scale_deformable_attention,
    library,
    multi_scale_deformable_attention,
)
from efficient_detr.structures import SpatialShapes
from tests.ops.deformable_attention_cases import arguments, fused_arguments, gradients

pytestmark = pytest.mark.gpu

PYRAMID: SpatialShapes = [(50, 84), (25, 42), (13, 21), (7, 11)]
# Output, gradient of the value; a value's share is rounded once, sums are not.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


@pytest.fixture(autouse=True)
def _compiled() -> None:
    problem = library.missing_reason(torch.device("cuda"))
    if problem:
        pytest.skip(f"needs the compiled CUDA kernels, but {problem}")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def plain(*inputs: Any) -> Tensor:
    return multi_scale_deformable_attention(*inputs, implementation="compiled")


def fused(*inputs: Any) -> Tensor:
    return fused_multi_scale_deformable_attention(*inputs, implementation="compiled")


def by_pytorch(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    operator = (
        multi_scale_deformable_attention
        if function is plain
        else fused_multi_scale_deformable_attention
    )
    return operator(*inputs, implementation="pytorch")


def on_gpu(
    inputs: tuple[Any, ...], dtype: torch.dtype = torch.float32, device: str = "cuda"
) -> list[Any]:
    """The value in `dtype`, all else in float32 or in float64 with it."""
    value, shapes, *sampling = inputs
    real = torch.promote_types(dtype, torch.float32)
    return [value.to(device, dtype), shapes, *(x.to(device, real) for x in sampling)]


def problems(**sizes: int) -> list[tuple[Callable[..., Tensor], tuple[Any, ...]]]:
    """The plain operator and the fused one with points and with boxes."""
    inputs = arguments(PYRAMID, heads=8, **sizes)
    return [
        (plain, inputs),
        (fused, fused_arguments(inputs, reference_size=2)),
        (fused, fused_arguments(inputs, reference_size=4)),
    ]


def as_double(inputs: list[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) else x for x in inputs]


def assert_near(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    scale = max(1.0, exact.abs().max().item())
    assert actual.isfinite().all()
    assert (actual.double() - exact).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("deterministic_too", [False, True])
@pytest.mark.parametrize(
    ("channels", "points"), [(32, 4), (16, 4), (64, 4), (32, 3), (32, 8), (24, 4), (100, 1)]
)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_equals_pytorch(
    dtype: torch.dtype, channels: int, points: int, deterministic_too: bool
) -> None:
    for function, inputs in problems(channels=channels, points=points, queries=301):
        given = on_gpu(inputs, dtype)
        exact_inputs = as_double(given)
        exact = by_pytorch(function, *exact_inputs)
        assert_near(function(*given), exact, TOLERANCES[dtype])
        upstream = torch.randn_like(exact).to(dtype)
        torch.use_deterministic_algorithms(deterministic_too)
        try:
            ours = gradients(function, upstream, *given)
        finally:
            torch.use_deterministic_algorithms(False)
        exact_gradients = gradients(
            lambda *x, f=function: by_pytorch(f, *x), upstream.double(), *exact_inputs
        )
        real = torch.promote_types(dtype, torch.float32)
        tolerances = [TOLERANCES[dtype], *[10 * TOLERANCES[real]] * len(ours[1:])]
        for actual, expected, tolerance in zip(ours, exact_gradients, tolerances, strict=True):
            assert_near(actual, expected, tolerance)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_deterministic_gradients_are_the_same_bits_in_every_run(dtype: torch.dtype) -> None:
    for function, inputs in problems(channels=32, points=4, queries=3000):
        given = on_gpu(inputs, dtype)
        upstream = torch.randn(2, 3000, 256, device="cuda", dtype=dtype)
        first = gradients(function, upstream, *given)
        for _ in range(5):
            again = gradients(function, upstream, *given)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_runs_on_the_current_stream() -> None:
    """The value becomes known late on another stream, so that work on the default one is wrong."""
    inputs = on_gpu(arguments(PYRAMID, heads=8, channels=32, points=4, queries=301))
    expected = plain(*inputs)
    upstream = torch.randn_like(expected)
    expected_gradients = gradients(plain, upstream, *inputs)
    value, shapes, locations, weights = inputs
    late = torch.zeros_like(value)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(value)
        output = plain(late, shapes, locations, weights)
        ours = gradients(plain, upstream, late, shapes, locations, weights)
    stream.synchronize()
    torch.testing.assert_close(output, expected)
    for actual, other in zip(ours, expected_gradients, strict=True):
        torch.testing.assert_close(actual, other, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_arguments() -> None:
    inputs = arguments(PYRAMID, heads=8, channels=32, points=4, queries=301)
    first, second = (on_gpu(inputs, device=f"cuda:{i}") for i in (0, 1))
    upstream = torch.randn(2, 301, 256)
    assert torch.cuda.current_device() == 0
    assert torch.equal(plain(*first).cpu(), plain(*second).cpu())
    ours = gradients(plain, upstream.to("cuda:1"), *second)
    others = gradients(plain, upstream.to("cuda:0"), *first)
    assert torch.cuda.current_device() == 0
    for actual, expected in zip(ours, others, strict=True):
        torch.testing.assert_close(actual.cpu(), expected.cpu(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_begin_at_an_odd_address(dtype: torch.dtype) -> None:
    """Contiguous, but no multiple of 16 bytes: the vector loads must not be used."""
    value, *rest = on_gpu(arguments(PYRAMID, heads=8, channels=32, points=4, queries=33), dtype)
    storage = torch.empty(value.numel() + 1, device="cuda", dtype=dtype)
    odd = storage[1:].view_as(value).copy_(value)
    assert odd.is_contiguous() and odd.data_ptr() % 16 != 0
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(plain(odd, *rest), plain(value, *rest), atol=tolerance, rtol=0)
    upstream = torch.randn(2, 33, 256, device="cuda", dtype=dtype)
    for actual, expected in zip(
        gradients(plain, upstream, odd, *rest),
        gradients(plain, upstream, value, *rest),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, atol=10 * tolerance, rtol=tolerance)


def test_more_images_than_a_grid_has_layers() -> None:
    inputs = on_gpu(arguments([(2, 3)], batch=65_540, queries=1, heads=1, channels=16, points=2))
    expected = by_pytorch(plain, *as_double(inputs))
    assert_near(plain(*inputs), expected, 1e-5)


def test_captures_into_a_graph() -> None:
    inputs = on_gpu(arguments(PYRAMID, heads=8, channels=32, points=4, queries=301))
    expected = plain(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = plain(*inputs)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


def test_limits_are_told() -> None:
    inputs = on_gpu(arguments([(1, 2)] * 33, channels=16))
    with pytest.raises(RuntimeError, match="deformable attention on CUDA: .* at most 32 levels"):
        plain(*inputs)
