"""What torch knows about neighbourhood attention as an operator.

The operator is implemented in Python. As one operator it keeps its arguments for the backward pass
instead of every matrix on the way, stays whole in a compiled or traced graph, and can be counted as
what it is. In the operators maps are (B, H, W, heads, D) and the table is float32, or float64 with
float64 maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from efficient_detr.ops import neighborhood_attention_pytorch as in_pytorch
from efficient_detr.ops.deformable_attention_pytorch import real_dtype

NAME = "neighborhood_attention"
DEVICES = ("cpu", "cuda")

_ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor position_bias_table"
_SCHEMAS = (
    f"{NAME}({_ARGUMENTS}) -> Tensor",
    f"{NAME}_backward(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)

_LIBRARY = torch.library.Library("efficient_detr", "FRAGMENT")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

OPERATORS = torch.ops.efficient_detr
"""Where the operators are called: `OPERATORS.neighborhood_attention(...)`."""


def _fake_output(query: Tensor, *others: Tensor) -> Tensor:
    return query.new_empty(query.shape)


def _fake_gradients(grad_output: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    return tuple(argument.new_empty(argument.shape) for argument in arguments)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = OPERATORS.neighborhood_attention_backward(
        grad_output, *ctx.saved_tensors
    )
    return gradients


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "neighbourhood attention has no second derivative: differentiate through it once, without "
        "create_graph=True"
    )


def _autocast_rule(operator: Callable[..., Tensor], device_type: str) -> Callable[..., Tensor]:
    """Maps keep the dtype that the projection before gave them, the table its precision."""

    def run(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return operator(query, key, value, table.to(real_dtype(query.dtype)))

    return run


def multiply_adds(output_shape: Sequence[int], table_shape: Sequence[int]) -> int:
    """Cost of the forward operator: query times key, and weight times value.

    The part of a tile that is masked counts as nothing, as do biases and softmax.

    Args:
        output_shape: (B, H, W, heads, D).
        table_shape: (heads, 2k - 1, 2k - 1).
    """
    return 2 * prod(output_shape) * ((table_shape[-1] + 1) // 2) ** 2


def _forward_flops(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    table: Sequence[int],
    **kwargs: Any,
) -> int:
    """As torch counts: a multiply-add is 2."""
    return 2 * multiply_adds(query, table)


def _backward_flops(grad_output: Sequence[int], *shapes: Any, **kwargs: Any) -> int:
    """The logits again, and two products for each of the forward pass."""
    forward: int = multiply_adds(grad_output, shapes[3])
    return forward + 2 * 2 * forward


def _register() -> None:
    forward, backward = f"efficient_detr::{NAME}", f"efficient_detr::{NAME}_backward"
    torch.library.register_fake(forward, _fake_output, lib=_LIBRARY)
    torch.library.register_fake(backward, _fake_gradients, lib=_LIBRARY)
    torch.library.register_autograd(forward, _gradients, setup_context=_keep_inputs, lib=_LIBRARY)
    # Without it, a second derivative would be zero with no more than a warning.
    torch.library.register_autograd(backward, _refuse_second_derivative, lib=_LIBRARY)
    for device_type in DEVICES:
        key = device_type.upper()
        _LIBRARY.impl(NAME, in_pytorch.attend, key)
        _LIBRARY.impl(f"{NAME}_backward", in_pytorch.gradients, key)
        rule = _autocast_rule(OPERATORS.neighborhood_attention, device_type)
        _LIBRARY.impl(NAME, rule, f"Autocast{key}")
    register_flop_formula(OPERATORS.neighborhood_attention)(_forward_flops)
    register_flop_formula(OPERATORS.neighborhood_attention_backward)(_backward_flops)


_register()
