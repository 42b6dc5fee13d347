"""Deformable attention in float32, float16 and bfloat16: how far from exact arithmetic.

The yardstick for 16 bits is the ideal: arguments rounded to the dtype, exact arithmetic, result
rounded. No implementation may be off by more than twice what the ideal is off.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficient_detr.ops import (
    deformable_sampling_locations,
    fused_multi_scale_deformable_attention,
    multi_scale_deformable_attention,
)
from efficient_detr.ops.deformable_attention_pytorch import (
    sample_by_grid_sample,
    softmax_over_points,
)
from efficient_detr.structures import SpatialShapes
from tests.ops.deformable_attention_cases import (
    IMPLEMENTATIONS,
    Implementation,
    arguments,
    fused_arguments,
    gradients,
)

implementations = pytest.mark.parametrize("run", IMPLEMENTATIONS, indirect=True)
half_precision = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])

# On a map of 200 columns, a location rounded to bfloat16 is off by up to 0.4 pixels.
WIDE: SpatialShapes = [(150, 200), (75, 100)]


def wide_arguments() -> tuple[Tensor, SpatialShapes, Tensor, Tensor]:
    """In float64; locations and weights are exact in float32."""
    value, shapes, locations, weights = arguments(WIDE, queries=50, heads=2, channels=16, points=4)
    locations = torch.rand_like(locations).float().double()
    return value, shapes, locations, weights.float().double()


def as_given(inputs: tuple, dtype: torch.dtype) -> list:
    """Values in `dtype`, everything else in float32."""
    value, shapes, *sampling = inputs
    return [value.to(dtype), shapes, *(tensor.float() for tensor in sampling)]


def worst(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected.double()).abs().max().item()


@implementations
def test_float32_is_close_to_float64(run: Implementation) -> None:
    plain = wide_arguments()
    for function, inputs in (
        (run.plain, plain),
        (run.fused, fused_arguments(plain, reference_size=2)),
        (run.fused, fused_arguments(plain, reference_size=4)),
    ):
        rounded = as_given(inputs, torch.float32)
        exact = [x.double() if isinstance(x, Tensor) else x for x in rounded]
        output = function(*rounded)
        assert output.dtype is torch.float32
        # Locations reach 200 pixels: float32 resolves 200 to 1.5e-5 pixels.
        tolerance = 1e-5 if function == run.plain else 1e-4
        assert worst(output, function(*exact)) <= tolerance


@implementations
@half_precision
def test_half_precision_values_keep_exact_locations(
    run: Implementation, dtype: torch.dtype
) -> None:
    inputs = wide_arguments()
    exact = sample_by_grid_sample(*inputs)
    value, shapes, locations, weights = inputs
    rounded = value.to(dtype).double(), shapes, locations, weights.to(dtype).double()
    ideal = sample_by_grid_sample(*rounded).to(dtype)
    output = run.plain(*as_given(inputs, dtype))
    assert output.dtype is dtype
    assert worst(output, exact) <= 2 * worst(ideal, exact)


@implementations
@half_precision
def test_half_precision_gradients(run: Implementation, dtype: torch.dtype) -> None:
    """The gradient of each argument has its dtype; those of the sampling stay in float32."""
    inputs = wide_arguments()
    value, *rest = inputs
    upstream = torch.randn(2, 50, 32, dtype=torch.float64)
    exact = gradients(sample_by_grid_sample, upstream, *inputs)
    of_rounded = gradients(
        sample_by_grid_sample, upstream.to(dtype).double(), value.to(dtype).double(), *rest
    )
    ideal = [of_rounded[0].to(dtype), *of_rounded[1:]]
    ours = gradients(run.plain, upstream.to(dtype), *as_given(inputs, dtype))
    assert [gradient.dtype for gradient in ours] == [dtype, torch.float32, torch.float32]
    for actual, best, expected in zip(ours, ideal, exact, strict=True):
        assert worst(actual, expected) <= 2 * worst(best, expected)


@implementations
@half_precision
@pytest.mark.parametrize("reference_size", [2, 4])
def test_half_precision_fused(run: Implementation, dtype: torch.dtype, reference_size: int) -> None:
    """Offsets and logits that a 16-bit layer made; the reference points are float32."""
    value, shapes, reference, offsets, logits = fused_arguments(
        wide_arguments(), reference_size=reference_size
    )
    offsets, logits, reference = offsets.to(dtype), logits.to(dtype), reference.float()
    locations = deformable_sampling_locations(reference.double(), offsets.double(), shapes)
    weights = softmax_over_points(logits.double())
    exact = sample_by_grid_sample(value, shapes, locations, weights)
    ideal = sample_by_grid_sample(value.to(dtype).double(), shapes, locations, weights).to(dtype)
    arguments_given = (value.to(dtype), shapes, reference, offsets, logits)
    output = run.fused(*arguments_given)
    assert output.dtype is dtype
    assert worst(output, exact) <= 2 * worst(ideal, exact)
    upstream = torch.ones_like(output)
    dtypes = [gradient.dtype for gradient in gradients(run.fused, upstream, *arguments_given)]
    assert dtypes == [dtype, torch.float32, dtype, dtype]


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.bfloat16])
def test_the_value_decides_the_dtype(
    run: Implementation, dtype: torch.dtype, other: torch.dtype
) -> None:
    plain = arguments([(4, 3)])
    for function, inputs in (
        (run.plain, plain),
        (run.fused, fused_arguments(plain, reference_size=4)),
    ):
        value, shapes, *sampling = inputs
        output = function(value.to(dtype), shapes, *(tensor.to(other) for tensor in sampling))
        assert output.dtype is dtype and output.isfinite().all()


@implementations
def test_autocast_touches_nothing(run: Implementation) -> None:
    """Under autocast the functions compute what they compute without, in the values' dtype."""
    plain = arguments([(4, 3), (2, 2)], dtype=torch.float32)
    fused = fused_arguments(plain, reference_size=4)
    expected = [run.plain(*plain), run.fused(*fused)]
    with torch.autocast(run.device, dtype=torch.bfloat16):
        outputs = [run.plain(*plain), run.fused(*fused)]
        half = multi_scale_deformable_attention(plain[0].bfloat16(), *plain[1:])
        fused_half = fused_multi_scale_deformable_attention(fused[0].bfloat16(), *fused[1:])
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert half.dtype is fused_half.dtype is torch.bfloat16
