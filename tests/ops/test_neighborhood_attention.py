"""Neighbourhood attention as an operator, in PyTorch and by `natten`.

The library itself needs a compiler; here modules with the signatures of its releases stand in.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from efficient_detr.ops import neighborhood_attention_natten as natten_adapter
from efficient_detr.ops import neighborhood_attention_pytorch as in_pytorch
from efficient_detr.ops.library import ENVIRONMENT_VARIABLE
from efficient_detr.ops.neighborhood_attention import neighborhood_attention
from efficient_detr.ops.neighborhood_attention_library import OPERATORS


@pytest.fixture(autouse=True)
def _without_natten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the library until a test puts one in its place; None makes the import fail."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "natten", None)
    monkeypatch.delitem(sys.modules, "natten.functional", raising=False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    natten_adapter._is_usable.cache_clear()
    natten_adapter._functions.cache_clear()


def tensors(
    height: int, width: int, kernel_size: int, heads: int = 2, depth: int = 3, images: int = 2
) -> list[Tensor]:
    """Query, key, value and table."""
    torch.manual_seed(0)
    maps = torch.randn(images, height, width, 3, heads, depth, dtype=torch.float64).unbind(3)
    side = 2 * kernel_size - 1
    return [*maps, torch.randn(heads, side, side, dtype=torch.float64)]


def neighbours(place: int, size: int, kernel_size: int) -> slice:
    first = min(max(place - kernel_size // 2, 0), size - kernel_size)
    return slice(first, first + kernel_size)


def by_definition(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """One query after the other."""
    kernel_size = (table.shape[-1] + 1) // 2
    height, width = query.shape[1:3]
    output = torch.empty_like(query)
    for y in range(height):
        for x in range(width):
            rows, columns = neighbours(y, height, kernel_size), neighbours(x, width, kernel_size)
            keys, values = (part[:, rows, columns].flatten(1, 2) for part in (key, value))
            logits = torch.einsum("bhd,bnhd->bhn", query[:, y, x], keys) / query.shape[-1] ** 0.5
            top, left = rows.start - y + kernel_size - 1, columns.start - x + kernel_size - 1
            bias = table[:, top : top + kernel_size, left : left + kernel_size].flatten(1)
            output[:, y, x] = torch.einsum("bhn,bnhd->bhd", (logits + bias).softmax(-1), values)
    return output


SIZES = [(7, 7, 7), (7, 16, 7), (9, 24, 5), (8, 9, 1), (25, 8, 3), (17, 23, 7), (11, 13, 11)]


@pytest.mark.parametrize(("height", "width", "kernel_size"), SIZES)
@pytest.mark.parametrize("logits_at_once", [1, 2**19])
def test_by_definition(
    height: int, width: int, kernel_size: int, logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and derivatives, whatever the number of tiles that run together."""
    monkeypatch.setattr(in_pytorch, "_LOGITS_ON_CPU", logits_at_once)
    arguments = [part.requires_grad_() for part in tensors(height, width, kernel_size)]
    found, expected = neighborhood_attention(*arguments), by_definition(*arguments)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    gradients = torch.autograd.grad(found, arguments, direction)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, arguments, direction))


def test_table_is_key_minus_query() -> None:
    """A large bias for "key one row below its query" makes every cell see the cell below."""
    _, _, value, _ = tensors(9, 9, 3, heads=1)
    table = torch.zeros(1, 5, 5, dtype=torch.float64)
    table[0, 1 + 2, 0 + 2] = 1000.0
    found = neighborhood_attention(torch.zeros_like(value), torch.zeros_like(value), value, table)
    torch.testing.assert_close(found[:, :-1], value[:, 1:])


def test_memory_follows_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step multiplies more than one row of tiles, however high the map is."""
    sizes: list[int] = []
    matmul = torch.matmul

    def note(one: Tensor, other: Tensor) -> Tensor:
        result = matmul(one, other)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(in_pytorch, "_LOGITS_ON_CPU", 1)
    monkeypatch.setattr(torch, "matmul", note)
    for height in (40, 80):
        in_pytorch.attend(*tensors(height, 16, 7, heads=1, images=1))
        # The largest product: 2 tiles of 8 * 8 queries with 14 * 14 keys, of which 2 * 4 columns
        # lie outside the map, in runs of one tile each as both are at a border.
        assert max(sizes) == 8 * 8 * 14 * 14


def test_operator_is_registered_in_full() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    maps = tensors(9, 8, 3)
    arguments = tuple(part.clone().requires_grad_() for part in maps)
    torch.library.opcheck(OPERATORS.neighborhood_attention.default, arguments, test_utils=checks)
    torch.library.opcheck(
        OPERATORS.neighborhood_attention_backward.default, (maps[0], *maps), test_utils=checks
    )


def test_compiled() -> None:
    """Without a break in the graph, for sizes that change, with derivatives."""
    options = dict(fullgraph=True, dynamic=True, backend="aot_eager")
    compiled = torch.compile(neighborhood_attention, **options)
    for size in ((9, 8), (6, 11)):
        arguments = [part.requires_grad_() for part in tensors(*size, 3)]
        results = [attend(*arguments) for attend in (compiled, neighborhood_attention)]
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(result.sum(), arguments) for result in results]
        torch.testing.assert_close(*gradients)


def test_transformed_and_forward_derivatives() -> None:
    """torch.func.grad and forward mode, which know no rules for operators, agree with autograd."""
    arguments = [part.requires_grad_() for part in tensors(9, 8, 3)]
    tangents = tuple(torch.randn_like(part) for part in arguments)
    expected = torch.autograd.grad(neighborhood_attention(*arguments).sum(), arguments)
    values = tuple(part.detach() for part in arguments)

    def total(*values: Tensor) -> Tensor:
        return neighborhood_attention(*values).sum()

    torch.testing.assert_close(torch.func.grad(total, argnums=(0, 1, 2, 3))(*values), expected)
    along = torch.func.jvp(total, values, tangents)[1]
    slopes = [(one * other).sum() for one, other in zip(expected, tangents, strict=True)]
    torch.testing.assert_close(along, torch.stack(slopes).sum())


def test_second_derivative_is_refused() -> None:
    arguments = [part.requires_grad_() for part in tensors(4, 4, 3)]
    output = neighborhood_attention(*arguments)
    (slope,) = torch.autograd.grad(output.sum(), arguments[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        slope.sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Maps of two bytes a value, under autocast or not; the table keeps its own dtype."""
    *maps, table = tensors(9, 16, 7)
    expected = neighborhood_attention(*maps, table)
    low = [part.to(dtype).requires_grad_() for part in maps]
    table = table.float().requires_grad_()
    output = neighborhood_attention(*low, table)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)
    gradients = torch.autograd.grad(output.float().sum(), [*low, table])
    assert [part.dtype for part in gradients] == [dtype, dtype, dtype, torch.float32]
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(neighborhood_attention(*low, table), output, rtol=0, atol=0)
        whole = neighborhood_attention(*(part.float() for part in maps), table)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole.double(), expected, rtol=0, atol=1e-5)


def test_cost_as_torch_counts() -> None:
    """A multiply-add is 2: 9 keys, twice 3 channels, 2 heads, 72 queries, 2 images.

    The backward pass has five such products for the two of the forward pass.
    """
    arguments = [part.requires_grad_() for part in tensors(9, 8, 3)]
    forward = 2 * (9 * 2 * 3 * 2 * 72 * 2)
    with FlopCounterMode(display=False) as counter:
        output = neighborhood_attention(*arguments)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 5 * forward // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, t: (q[0], k, v, t), "must all be"),
        (lambda q, k, v, t: (q, k[:, :-1], v, t), "must all be"),
        (lambda q, k, v, t: (q, k, v, t[:1]), "2 heads"),
        (lambda q, k, v, t: (q, k, v, t[:, :-2, :-2]), "odd k"),
        (lambda q, k, v, t: (q[:, :4], k[:, :4], v[:, :4], t), "5 cells does not fit .* 4 x 8"),
    ],
)
def test_bad_arguments(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(*change(*tensors(9, 8, 5)))


# natten ------------------------------------------------------------------------------------------


def natten_logits(query: Tensor, key: Tensor, rpb: Tensor, kernel_size: int) -> Tensor:
    """What natten's first function gives: (B, heads, H, W, D) to (B, heads, H, W, k * k)."""
    height, width = query.shape[2:4]
    rows_of_logits = []
    for y in range(height):
        for x in range(width):
            rows, columns = neighbours(y, height, kernel_size), neighbours(x, width, kernel_size)
            keys = key[:, :, rows, columns].flatten(2, 3)
            top, left = rows.start - y + kernel_size - 1, columns.start - x + kernel_size - 1
            bias = rpb[:, top : top + kernel_size, left : left + kernel_size].flatten(1)
            rows_of_logits.append(torch.einsum("bhd,bhnd->bhn", query[:, :, y, x], keys) + bias)
    return torch.stack(rows_of_logits, 2).unflatten(2, (height, width))


def natten_sum(attn: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """What natten's second function gives."""
    height, width = value.shape[2:4]
    sums = [
        torch.einsum(
            "bhn,bhnd->bhd",
            attn[:, :, y, x],
            value[
                :, :, neighbours(y, height, kernel_size), neighbours(x, width, kernel_size)
            ].flatten(2, 3),
        )
        for y in range(height)
        for x in range(width)
    ]
    return torch.stack(sums, 2).unflatten(2, (height, width))


def release_14(calls: list[str]) -> ModuleType:
    def natten2dqkrpb(query, key, rpb, kernel_size, dilation):
        assert dilation == 1
        calls.append("natten2dqkrpb")
        return natten_logits(query, key, rpb, kernel_size)

    def natten2dav(attn, value, kernel_size, dilation):
        assert dilation == 1
        return natten_sum(attn, value, kernel_size)

    return _module(natten2dqkrpb=natten2dqkrpb, natten2dav=natten2dav)


def release_17(calls: list[str]) -> ModuleType:
    def na2d_qk(
        query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None
    ):
        calls.append("na2d_qk")
        return natten_logits(query, key, rpb, kernel_size)

    def na2d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False):
        return natten_sum(attn, value, kernel_size)

    module = release_14([])  # the old names are still there, and complain
    module.na2d_qk, module.na2d_av = na2d_qk, na2d_av
    return module


def release_14_4(calls: list[str]) -> ModuleType:
    def natten2dqkrpb(query, key, rpb, dilation):
        raise AssertionError("must not be called")

    return _module(natten2dqkrpb=natten2dqkrpb, natten2dav=natten2dqkrpb)


def release_20(calls: list[str]) -> ModuleType:
    def na2d(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None):
        raise AssertionError("must not be called")

    return _module(na2d=na2d)


def wrong_results(calls: list[str]) -> ModuleType:
    module = release_14(calls)
    right = module.natten2dqkrpb

    def natten2dqkrpb(query, key, rpb, kernel_size, dilation):
        return right(query, key, rpb.flip(1), kernel_size, dilation)

    module.natten2dqkrpb = natten2dqkrpb
    return module


def without_kernels(calls: list[str]) -> ModuleType:
    def natten2dqkrpb(query, key, rpb, kernel_size, dilation):
        raise RuntimeError("NATTEN is not compiled with CUDA.\nlong explanation")

    return _module(natten2dqkrpb=natten2dqkrpb, natten2dav=natten2dqkrpb)


def _module(**functions) -> ModuleType:
    module = ModuleType("natten.functional")
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def install(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("natten")
    package.functional = module
    monkeypatch.setitem(sys.modules, "natten", package)
    monkeypatch.setitem(sys.modules, "natten.functional", module)


@pytest.mark.parametrize(
    ("release", "name"), [(release_14, "natten2dqkrpb"), (release_17, "na2d_qk")]
)
def test_natten_is_used(
    release, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    install(release(calls), monkeypatch)
    arguments = [part.requires_grad_() for part in tensors(7, 9, 5)]
    with caplog.at_level(logging.INFO):
        found = [neighborhood_attention(*arguments) for _ in range(2)][1]
    assert calls == [name] * 3  # a trial, and each call
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "on cpu in float64 uses natten" in caplog.text
    expected = in_pytorch.attend(*arguments)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.sum(), arguments)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), arguments))


def test_natten_is_tried_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial needs gradients, although the call that causes it has none."""
    calls: list[str] = []
    install(release_14(calls), monkeypatch)
    arguments = tensors(4, 4, 3)
    with torch.inference_mode(), torch.autocast("cpu"):
        neighborhood_attention(*arguments)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("release", "reason"),
    [
        (release_14_4, "cannot add a learned position bias; versions 0.14.5 to 0.17 can."),
        (release_20, "cannot add a learned position bias; versions 0.14.5 to 0.17 can."),
        (wrong_results, "gives other results."),
        (without_kernels, "fails (NATTEN is not compiled with CUDA.)."),
    ],
)
def test_unusable_natten_is_declined_once(
    release, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(release([]), monkeypatch)
    arguments = tensors(7, 9, 5)
    for _ in range(2):
        found = neighborhood_attention(*arguments)
    torch.testing.assert_close(found, by_definition(*arguments))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "uses plain PyTorch, because the installed natten" in caplog.text
    assert reason in caplog.text


def test_damaged_natten_is_declined(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A package without the module: here the import itself fails."""
    monkeypatch.setitem(sys.modules, "natten", ModuleType("natten"))
    neighborhood_attention(*tensors(4, 4, 3))
    assert "cannot be imported" in caplog.text


def test_without_natten_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        neighborhood_attention(*tensors(4, 4, 3))
    assert not caplog.records


def test_natten_can_be_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    install(release_14(calls), monkeypatch)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "pytorch")
    neighborhood_attention(*tensors(4, 4, 3))
    assert not calls


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_trace_has_the_operator_and_not_natten(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    install(release_14(calls), monkeypatch)
    arguments = tuple(tensors(4, 4, 3))
    traced = torch.jit.trace(neighborhood_attention, arguments, check_trace=False)
    assert "efficient_detr::neighborhood_attention" in str(traced.graph)
    assert not calls
