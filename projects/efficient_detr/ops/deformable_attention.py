"""Multi-scale deformable attention (Zhu et al. 2021, equation 3), after the projections.

    output[b, q, h] = sum over levels l and points p of
        attention_weights[b, q, h, l, p] * bilinear(value level l of head h, sampling location)

A location (x, y) in [0, 1] maps to pixel coordinates x * W_l - 0.5, y * H_l - 0.5; corners outside
a level count as zero, which is grid_sample's `align_corners=False, padding_mode="zeros"`. A point
whose pixel coordinates leave [-1, W_l) x [-1, H_l), or are not finite, contributes nothing and gets
no gradient.

Shape letters: B images, S tokens over all levels, Q queries, H heads, D channels a head, L levels,
P points. Values may have any floating dtype; locations are read, and sums are kept, in float32 or
better, because rounding locations to half precision moves samples by up to a pixel.

Each function runs a compiled operator where one was built for the device, and plain PyTorch
elsewhere; `efficient_detr.ops.library.choose` decides. Compiled, they differentiate once, in
reverse mode; a second derivative is refused, forward mode and `torch.func` run in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_detr.ops import deformable_attention_pytorch as in_pytorch
from efficient_detr.ops import library
from efficient_detr.ops.deformable_attention_library import OPERATORS, flat_shapes
from efficient_detr.ops.deformable_attention_pytorch import real_dtype

_VALUE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Sample `value` at `sampling_locations` and add the samples up by `attention_weights`.

    Args:
        value: (B, S, H, D) projected tokens of all levels, finite; float32, float64, float16 or
            bfloat16.
        spatial_shapes: (H_l, W_l) of each level, products adding up to S.
        sampling_locations: (B, Q, H, L, P, 2) points (x, y), usually in [0, 1].
        attention_weights: (B, Q, H, L, P), usually adding up to 1 over L and P.
        implementation: "compiled" or "pytorch", or None for the one that `library.choose` picks.

    Returns:
        (B, Q, H * D) in the dtype of `value`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
        RuntimeError: if the compiled operator is asked for and is not there.
    """
    sampling = {"sampling_locations": sampling_locations, "attention_weights": attention_weights}
    _check_value(value, spatial_shapes)
    _check_companions(value, sampling)
    _check_points(value, spatial_shapes, **sampling)
    if library.choose(value.device, implementation) == "pytorch":
        return in_pytorch.attend(value, spatial_shapes, sampling_locations, attention_weights)
    dtype = real_dtype(value.dtype)
    return OPERATORS.multi_scale_deformable_attention(
        value,
        flat_shapes(spatial_shapes),
        sampling_locations.to(dtype),
        attention_weights.to(dtype),
    )


def fused_multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """`multi_scale_deformable_attention` that finds locations and weights itself.

    The locations are those of :func:`deformable_sampling_locations`, the weights the softmax of the
    logits over levels and points. Compiled, neither is ever written to memory.

    Args:
        value: (B, S, H, D) projected tokens of all levels, finite; float32, float64, float16 or
            bfloat16.
        spatial_shapes: (H_l, W_l) of each level, products adding up to S.
        reference: (B, Q, L, 2) points (x, y) or (B, Q, L, 4) boxes (cx, cy, w, h), normalised to
            each level.
        sampling_offsets: (B, Q, H, L, P, 2): cells around a point, 1/P of half the size of a box.
        attention_logits: (B, Q, H, L, P).
        implementation: "compiled" or "pytorch", or None for the one that `library.choose` picks.

    Returns:
        (B, Q, H * D) in the dtype of `value`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
        RuntimeError: if the compiled operator is asked for and is not there.
    """
    points = {"sampling_offsets": sampling_offsets, "attention_logits": attention_logits}
    _check_value(value, spatial_shapes)
    _check_companions(value, {"reference": reference, **points})
    _check_points(value, spatial_shapes, **points)
    _check_reference(reference, sampling_offsets)
    if library.choose(value.device, implementation) == "pytorch":
        return in_pytorch.attend_fused(
            value, spatial_shapes, reference, sampling_offsets, attention_logits
        )
    dtype = real_dtype(value.dtype)
    return OPERATORS.fused_multi_scale_deformable_attention(
        value,
        flat_shapes(spatial_shapes),
        reference.to(dtype),
        sampling_offsets.to(dtype),
        attention_logits.to(dtype),
    )


def _check_value(value: Tensor, spatial_shapes: list[tuple[int, int]]) -> None:
    if value.dim() != 4:
        raise ValueError(f"value must be (B, S, H, D), but is {tuple(value.shape)}")
    if value.dtype not in _VALUE_DTYPES:
        raise ValueError(
            f"value must be float32, float64, float16 or bfloat16, but is {value.dtype}"
        )
    _check_are_pairs(spatial_shapes)
    if not spatial_shapes or any(height < 1 or width < 1 for height, width in spatial_shapes):
        raise ValueError(
            f"spatial_shapes must hold pairs (H_l, W_l) of at least 1, but is {spatial_shapes}"
        )
    tokens, expected = value.shape[1], sum(height * width for height, width in spatial_shapes)
    if tokens != expected:
        raise ValueError(
            f"value has {tokens} tokens, but the spatial shapes {spatial_shapes} hold {expected}"
        )


def _check_are_pairs(spatial_shapes: object) -> None:
    """Other packages take a tensor here, whose numbers a GPU hands out slowly."""
    if not isinstance(spatial_shapes, Sequence) or not all(map(_is_pair, spatial_shapes)):
        raise ValueError(
            "spatial_shapes must be a list of pairs (H_l, W_l) of integers, not a tensor, but is "
            f"{spatial_shapes}; convert a tensor once with .tolist()"
        )


def _is_pair(shape: object) -> bool:
    # While a graph is traced, sizes are not plain integers, but still serve as one.
    return (
        isinstance(shape, Sequence)
        and len(shape) == 2
        and all(hasattr(size, "__index__") for size in shape)
    )


def _check_companions(value: Tensor, tensors: dict[str, Tensor]) -> None:
    """Everything but `value` is floating and lives on its device."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, but is {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, but value is on {value.device}")


def _check_points(
    value: Tensor, spatial_shapes: list[tuple[int, int]], **points_and_weights: Tensor
) -> None:
    """The first is (B, Q, H, L, P, 2) and the second (B, Q, H, L, P)."""
    (points_name, points), (weights_name, weights) = points_and_weights.items()
    batch, _, heads, _ = value.shape
    levels = len(spatial_shapes)
    fits = weights.dim() == 5 and points.shape == (*weights.shape, 2) and weights.shape[4] > 0
    if not fits or (weights.shape[0], *weights.shape[2:4]) != (batch, heads, levels):
        raise ValueError(
            f"{points_name} and {weights_name} must be (B, Q, H, L, P, 2) and (B, Q, H, L, P) with "
            f"B={batch}, H={heads}, L={levels} and P > 0, but are {tuple(points.shape)} and "
            f"{tuple(weights.shape)}"
        )


def _check_reference(reference: Tensor, sampling_offsets: Tensor) -> None:
    batch, queries, _, levels = sampling_offsets.shape[:4]
    if reference.dim() != 4 or reference.shape[-1] not in (2, 4) or reference.shape[:3] != (
        batch, queries, levels
    ):  # fmt: skip
        raise ValueError(
            f"reference must be (B, Q, L, 2) or (B, Q, L, 4) with B={batch}, Q={queries}, "
            f"L={levels}, but is {tuple(reference.shape)}"
        )
