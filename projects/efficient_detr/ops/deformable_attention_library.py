"""What torch knows about the compiled operators of multi-scale deformable attention.

Schemas, shapes of results, derivatives, autocast rules, costs and a decomposition: all of this is
registered on import, whether or not anything was compiled. The kernels themselves register for
their devices when `efficient_detr.ops.library` loads them.

In the operators, spatial shapes are flat: H_0, W_0, H_1, W_1, ...; everything but `value` is
float32, or float64 with a float64 value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from efficient_detr.ops import deformable_attention_pytorch as in_pytorch
from efficient_detr.ops.deformable_attention_pytorch import real_dtype

PLAIN = "multi_scale_deformable_attention"
FUSED = "fused_multi_scale_deformable_attention"

_SCHEMAS = (
    f"{PLAIN}(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
    "Tensor attention_weights) -> Tensor",
    f"{PLAIN}_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
    "Tensor sampling_locations, Tensor attention_weights, bool deterministic) "
    "-> (Tensor, Tensor, Tensor)",
    f"{FUSED}(Tensor value, SymInt[] spatial_shapes, Tensor reference, Tensor sampling_offsets, "
    "Tensor attention_logits) -> Tensor",
    f"{FUSED}_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
    "Tensor reference, Tensor sampling_offsets, Tensor attention_logits, "
    "bool needs_reference_gradient, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)",
)

_LIBRARY = torch.library.Library("efficient_detr", "FRAGMENT")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

OPERATORS = torch.ops.efficient_detr
"""Where the operators are called: `OPERATORS.multi_scale_deformable_attention(...)`."""


def flat_shapes(spatial_shapes: list[tuple[int, int]]) -> list[int]:
    """Pairs (H_l, W_l) as the operators take them."""
    return [size for shape in spatial_shapes for size in shape]


def paired_shapes(flat: list[int]) -> list[tuple[int, int]]:
    """The inverse of `flat_shapes`."""
    return list(zip(flat[::2], flat[1::2], strict=True))


# Shapes of results -------------------------------------------------------------------------------


def _fake_output(value: Tensor, spatial_shapes: list[int], *sampling: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    queries = sampling[-1].shape[1]
    return value.new_empty(batch, queries, heads * channels)


def _fake_gradients(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, sampling_locations, attention_weights))


def _fake_fused_gradients(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    needs_reference_gradient: bool,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    grad_reference = reference.new_empty(reference.shape if needs_reference_gradient else (0,))
    grad_value, grad_offsets, grad_logits = (
        x.new_empty(x.shape) for x in (value, sampling_offsets, attention_logits)
    )
    return grad_value, grad_reference, grad_offsets, grad_logits


# Derivatives -------------------------------------------------------------------------------------


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, *sampling = inputs
    ctx.save_for_backward(value, *sampling)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = OPERATORS.multi_scale_deformable_attention_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        locations,
        weights,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grad_value, None, grad_locations, grad_weights


def _fused_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, reference, offsets, logits = ctx.saved_tensors
    needs_reference_gradient = ctx.needs_input_grad[2]
    grad_value, grad_reference, grad_offsets, grad_logits = (
        OPERATORS.fused_multi_scale_deformable_attention_backward(
            grad_output,
            value,
            ctx.spatial_shapes,
            reference,
            offsets,
            logits,
            needs_reference_gradient,
            torch.are_deterministic_algorithms_enabled(),
        )
    )
    if not needs_reference_gradient:
        grad_reference = None
    return grad_value, None, grad_reference, grad_offsets, grad_logits


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "multi-scale deformable attention has no second derivative: differentiate through it once, "
        "without create_graph=True"
    )


# Autocast ----------------------------------------------------------------------------------------


def _autocast_rule(operator: Callable[..., Tensor], device_type: str) -> Callable[..., Tensor]:
    """`value` keeps its dtype, the rest keeps the precision that locations need."""

    def run(value: Tensor, spatial_shapes: list[int], *sampling: Tensor) -> Tensor:
        dtype = real_dtype(value.dtype)
        with torch.autocast(device_type, enabled=False):
            return operator(value, spatial_shapes, *(tensor.to(dtype) for tensor in sampling))

    return run


# Decomposition -----------------------------------------------------------------------------------


def _by_grid_sample(
    value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    dtype = real_dtype(value.dtype)
    output = in_pytorch.sample_by_grid_sample(
        value.to(dtype), paired_shapes(spatial_shapes), sampling_locations, attention_weights
    )
    return output.to(value.dtype)


def _fused_by_grid_sample(
    value: Tensor,
    spatial_shapes: list[int],
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    shapes = paired_shapes(spatial_shapes)
    locations = in_pytorch.deformable_sampling_locations(reference, sampling_offsets, shapes)
    weights = in_pytorch.softmax_over_points(attention_logits)
    return _by_grid_sample(value, spatial_shapes, locations, weights)


def export_decompositions() -> dict[torch._ops.OpOverload, Callable[..., Tensor]]:
    """Compiled operator -> the same in PyTorch's own operators, for `torch.export`.

    An exported program keeps the compiled operators as single nodes. For runtimes that do not know
    them:

        exported = exported.run_decompositions(export_decompositions())

    `torch.onnx.export` of a model needs no such step: while it runs, PyTorch's own operators are
    used from the start.
    """
    return {
        OPERATORS.multi_scale_deformable_attention.default: _by_grid_sample,
        OPERATORS.fused_multi_scale_deformable_attention.default: _fused_by_grid_sample,
    }


# Costs -------------------------------------------------------------------------------------------


def multiply_adds(output_shape: Sequence[int], weights_shape: Sequence[int]) -> int:
    """Cost of the forward operators: 4 corners of each sampled channel.

    Softmax and location arithmetic count as nothing, as they do outside the fused operator.

    Args:
        output_shape: (B, Q, H * D).
        weights_shape: (B, Q, H, L, P) of the attention weights or logits.
    """
    return 4 * prod(output_shape) * prod(weights_shape[-2:])


def _forward_flops(value: list[int], spatial_shapes: list[int], *shapes: Any, **kwargs: Any) -> int:
    """As torch counts: a multiply-add is 2."""
    return 2 * multiply_adds(kwargs["out_shape"], shapes[-1])


def _backward_flops(grad_output: list[int], *shapes: Any, **kwargs: Any) -> int:
    """Backward, corners are multiplied by the gradient, and their gradients are added up."""
    weights_shape = [shape for shape in shapes if isinstance(shape, torch.Size)][-1]
    return 2 * 2 * multiply_adds(grad_output, weights_shape)


# Registration ------------------------------------------------------------------------------------


def _register(name: str, fake_gradients: Callable[..., Any], gradients: Callable[..., Any]) -> None:
    forward, backward = f"efficient_detr::{name}", f"efficient_detr::{name}_backward"
    torch.library.register_fake(forward, _fake_output, lib=_LIBRARY)
    torch.library.register_fake(backward, fake_gradients, lib=_LIBRARY)
    torch.library.register_autograd(forward, gradients, setup_context=_keep_inputs, lib=_LIBRARY)
    # Without it, a second derivative would be zero with no more than a warning.
    torch.library.register_autograd(backward, _refuse_second_derivative, lib=_LIBRARY)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _LIBRARY.impl(name, _autocast_rule(getattr(OPERATORS, name), device_type), key)
    register_flop_formula(getattr(OPERATORS, name))(_forward_flops)
    register_flop_formula(getattr(OPERATORS, f"{name}_backward"))(_backward_flops)


_register(PLAIN, _fake_gradients, _gradients)
_register(FUSED, _fake_fused_gradients, _fused_gradients)
