"""Deformable attention: arguments that do not fit, and the choice of the implementation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_detr.ops import (
    fused_multi_scale_deformable_attention,
    library,
    multi_scale_deformable_attention,
)
from tests.ops.deformable_attention_cases import (
    COMPILED,
    Implementation,
    arguments,
    fused_arguments,
)

Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, p, w: (v[:, :-1], p, w), r"15 tokens.*hold 16"),
        (lambda v, p, w: (v, p[:, :-1], w), "sampling_locations and attention_weights must be"),
        (lambda v, p, w: (v, p, w[..., :-1]), "sampling_locations and attention_weights must be"),
        (lambda v, p, w: (v, p[..., :1], w), "sampling_locations and attention_weights must be"),
        (lambda v, p, w: (v, p, w.flatten(3)), "sampling_locations and attention_weights must be"),
        (lambda v, p, w: (v[:1], p, w), "B=1"),
        (lambda v, p, w: (v[:, :, :2], p, w), "H=2"),
        (lambda v, p, w: (v, p[:, :, :, :1], w[:, :, :, :1]), "L=2"),
        (lambda v, p, w: (v.flatten(2), p, w), r"value must be \(B, S, H, D\).*\(2, 16, 6\)"),
        (lambda v, p, w: (v.long(), p, w), "value must be float32.*but is torch.int64"),
        (lambda v, p, w: (v, p.long(), w), "sampling_locations must be of a floating dtype"),
        (lambda v, p, w: (v, p, w > 0), "attention_weights must be of a floating dtype"),
        (lambda v, p, w: (v, p.to("meta"), w), "sampling_locations is on meta, but value is on"),
        (lambda v, p, w: (v, p, w.to("meta")), "attention_weights is on meta, but value is on"),
    ],
)
@pytest.mark.parametrize("implementation", ["pytorch", None])
def test_arguments_that_do_not_fit(
    change: Change, message: str, implementation: str | None
) -> None:
    value, shapes, locations, weights = arguments([(4, 3), (2, 2)])
    value, locations, weights = change(value, locations, weights)
    with pytest.raises(ValueError, match=message):
        multi_scale_deformable_attention(
            value, shapes, locations, weights, implementation=implementation
        )


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda v: v[:, :-1], r"15 tokens.*hold 16"),
        (1, lambda r: r[:, :-1], r"reference must be \(B, Q, L, 2\).*Q=5"),
        (1, lambda r: r[..., :3], r"reference must be .*\(2, 5, 2, 3\)"),
        (1, lambda r: r[:, :, 0], "reference must be"),
        (1, lambda r: r.long(), "reference must be of a floating dtype"),
        (1, lambda r: r.to("meta"), "reference is on meta"),
        (2, lambda o: o[..., :1], "sampling_offsets and attention_logits must be"),
        (3, lambda a: a[:, :, :1], "sampling_offsets and attention_logits must be"),
        (3, lambda a: a.int(), "attention_logits must be of a floating dtype"),
    ],
)
def test_fused_arguments_that_do_not_fit(
    position: int, change: Callable[[Tensor], Tensor], message: str
) -> None:
    value, shapes, *sampling = fused_arguments(arguments([(4, 3), (2, 2)]), reference_size=4)
    tensors = [value, *sampling]
    tensors[position] = change(tensors[position])
    with pytest.raises(ValueError, match=message):
        fused_multi_scale_deformable_attention(tensors[0], shapes, *tensors[1:])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (torch.tensor([[4, 3], [2, 2]]), "list of pairs .* not a tensor"),
        ([torch.tensor([4, 3]), torch.tensor([2, 2])], "convert a tensor once"),
        ([(4.0, 3.0), (2.0, 2.0)], "pairs .* of integers"),
        ([(4, 3, 1), (2, 2, 1)], "list of pairs"),
        ([], r"at least 1, but is \[\]"),
        ([(4, 4), (0, 2)], r"at least 1, but is \[\(4, 4\), \(0, 2\)\]"),
    ],
)
def test_spatial_shapes_that_are_none(shapes: object, message: str) -> None:
    value, _, *sampling = arguments([(4, 3), (2, 2)])
    with pytest.raises(ValueError, match=message):
        multi_scale_deformable_attention(value, shapes, *sampling)  # type: ignore[arg-type]


class OurCalls(TorchDispatchMode):
    """Counts the calls of compiled operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "efficient_detr"
        return func(*args, **(kwargs or {}))


def call_both(implementation: str | None) -> int:
    """Runs both functions; returns how many of them were compiled."""
    plain = arguments([(4, 3), (2, 2)])
    with OurCalls() as ours:
        multi_scale_deformable_attention(*plain, implementation=implementation)
        fused = fused_arguments(plain, reference_size=2)
        fused_multi_scale_deformable_attention(*fused, implementation=implementation)
    return ours.count


def test_pytorch_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "compiled")
    assert call_both("pytorch") == 0
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "pytorch")
    assert call_both(None) == 0


@pytest.mark.parametrize("run", COMPILED[:1], indirect=True)
def test_compiled_can_be_forced(run: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "pytorch")
    assert call_both("compiled") == 2
    monkeypatch.delenv(library.ENVIRONMENT_VARIABLE)
    assert call_both(None) == 2


def test_compiled_without_a_kernel_says_why() -> None:
    value, shapes, *sampling = (
        x.to("meta") if isinstance(x, Tensor) else x for x in arguments([(4, 3), (2, 2)])
    )
    with pytest.raises(RuntimeError, match="meta"):
        multi_scale_deformable_attention(value, shapes, *sampling, implementation="compiled")
    output = multi_scale_deformable_attention(value, shapes, *sampling)
    assert output.shape == (2, 5, 6) and output.is_meta
