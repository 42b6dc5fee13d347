"""Multi-scale deformable attention as others compute it: in PyTorch, and in other packages.

Shape letters as in `efficient_detr.ops`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from efficient_detr.ops import deformable_sampling_locations
from efficient_detr.ops.deformable_attention_pytorch import softmax_over_points

SpatialShapes = list[tuple[int, int]]
Sampler = Callable[[Tensor, SpatialShapes, Tensor, Tensor], Tensor]


def sample_as_usual(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The PyTorch formulation in common use, reference of all ratios.

    One `grid_sample` a level, the samples of all levels side by side, then the weighted sum: what
    Deformable DETR describes and what its descendants run where they have no kernel.
    """
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    samples = []
    for level, (tokens, (height, width)) in enumerate(zip(levels, spatial_shapes, strict=True)):
        feature_map = tokens.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = 2 * sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        samples.append(
            F.grid_sample(
                feature_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False
            )  # (BH, D, Q, P)
        )
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    output = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)  # (BH, D, Q)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def with_arithmetic(
    sample: Sampler,
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """What the fused operator replaces: locations and softmax in PyTorch, then a sampler."""
    locations = deformable_sampling_locations(reference, sampling_offsets, spatial_shapes)
    return sample(value, spatial_shapes, locations, softmax_over_points(attention_logits))


def usual_arithmetic(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`sample_as_usual` with locations and softmax as in common use: no care for NaN."""
    reference = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        sizes = torch.tensor(spatial_shapes, device=value.device).flip(1)[:, None]
        locations = reference + sampling_offsets / sizes
    else:
        steps = sampling_offsets / sampling_offsets.shape[-2]
        locations = reference[..., :2] + steps * reference[..., 2:] * 0.5
    weights = attention_logits.flatten(-2).softmax(-1).view_as(attention_logits)
    return sample_as_usual(value, spatial_shapes, locations, weights)


# Other packages ----------------------------------------------------------------------------------


def _from_mmcv(device: torch.device) -> Sampler:
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    if device.type == "cpu":

        def sample_cpu(
            value: Tensor, shapes: SpatialShapes, locations: Tensor, weights: Tensor
        ) -> Tensor:
            sizes = torch.tensor(shapes)
            return module.multi_scale_deformable_attn_pytorch(value, sizes, locations, weights)

        return sample_cpu

    def sample(value: Tensor, shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
        sizes, starts = _device_shapes(shapes, value.device)
        step = value.shape[0]  # the whole batch at once
        return module.MultiScaleDeformableAttnFunction.apply(
            value, sizes, starts, locations, weights, step
        )

    return sample


def _from_hub(device: torch.device) -> Sampler:
    if device.type == "cpu":
        raise ImportError("it has no kernel for the CPU")
    kernel = importlib.import_module("kernels").get_kernel("kernels-community/deformable-detr")

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, step, sizes, starts, *tensors):
            value, locations, weights = tensors
            ctx.step = step
            ctx.save_for_backward(value, sizes, starts, locations, weights)
            return kernel.ms_deform_attn_forward(value, sizes, starts, locations, weights, step)

        @staticmethod
        def backward(ctx, gradient):
            gradients = kernel.ms_deform_attn_backward(
                *ctx.saved_tensors, gradient.contiguous(), ctx.step
            )
            return (None, None, None, *gradients)

    def sample(value: Tensor, shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
        sizes, starts = _device_shapes(shapes, value.device)
        return Attention.apply(value.shape[0], sizes, starts, value, locations, weights)

    return sample


def _device_shapes(shapes: SpatialShapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """(L, 2) sizes and (L,) first tokens of the levels, as other packages take them."""
    key = (tuple(shapes), device)
    if key not in _SHAPES_ON_DEVICE:
        sizes = torch.tensor(shapes, device=device)
        areas = sizes.prod(1)
        _SHAPES_ON_DEVICE[key] = sizes, areas.cumsum(0) - areas
    return _SHAPES_ON_DEVICE[key]


# A model makes them once for all layers; so their cost does not belong to an operator.
_SHAPES_ON_DEVICE: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

OTHER_PACKAGES: dict[str, Callable[[torch.device], Sampler]] = {
    "mmcv": _from_mmcv,
    "kernels hub": _from_hub,
}


def find_other_packages(device: torch.device) -> tuple[dict[str, Sampler], dict[str, str]]:
    """Operators of other packages, and for those that cannot be had the reason."""
    found, missing = {}, {}
    for name, load in OTHER_PACKAGES.items():
        try:
            found[name] = load(device)
        except ModuleNotFoundError as error:
            missing[name] = f"not installed (no module {error.name})"
        # Whatever a foreign package does wrong while it loads, the benchmark goes on without it.
        except Exception as error:
            missing[name] = f"not usable: {str(error).strip().partition(chr(10))[0]}"
    return found, missing
