"""The CUDA kernels of deformable attention on an emulated thread grid, against PyTorch.

Everything but the GPU is as it will be: launchers, grids, shuffles, atomics. The address sanitizer
watches the memory; seeds other than 0 shuffle the order of blocks and threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.ops.deformable_attention_pytorch import (
    deformable_sampling_locations,
    real_dtype,
    sample_by_grid_sample,
    softmax_over_points,
)
from tests.cuda_emulation import Driver, MisuseError, compile_driver, tensor_from

STORAGES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # as in problem.h
TOLERANCES = {"float32": 1e-5, "float64": 1e-11, "float16": 2e-3, "bfloat16": 1.6e-2}
PYRAMID = [(6, 8), (3, 4), (2, 2), (1, 1)]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return compile_driver("deformable_attention_driver", tmp_path_factory.mktemp("attention"))


@dataclass
class Problem:
    """Sizes, and what `filled` draws for them; `reference_size` 0 is the plain operator."""

    shapes: list[tuple[int, int]]
    images: int = 1
    queries: int = 5
    heads: int = 2
    channels: int = 32
    points: int = 4
    reference_size: int = 0
    misaligned: bool = False
    dtype: torch.dtype = torch.float32
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def filled(self) -> Problem:
        """With random tensors; about a third of the points lies outside its level."""
        tokens = sum(height * width for height, width in self.shapes)
        levels = len(self.shapes)
        grid = (self.images, self.queries, self.heads, levels, self.points)
        real = real_dtype(self.dtype)
        tensors = {
            "value": torch.randn(self.images, tokens, self.heads, self.channels).to(self.dtype),
            "grad_output": torch.randn(self.images, self.queries, self.heads * self.channels),
        }
        tensors["grad_output"] = tensors["grad_output"].to(self.dtype)
        if self.reference_size == 0:
            tensors["locations"] = (torch.rand(*grid, 2) * 1.6 - 0.3).to(real)
            tensors["weights"] = torch.randn(grid).to(real)
        else:
            reference = torch.rand(self.images, self.queries, levels, self.reference_size)
            tensors["reference"] = reference.to(real)
            spread = 4.0 if self.reference_size == 4 else 1.5
            tensors["offsets"] = (torch.randn(*grid, 2) * spread).to(real)
            tensors["logits"] = (torch.randn(grid) * 2).to(real)
        return replace(self, tensors=tensors)

    def inputs(self) -> dict[str, Any]:
        sizes = ("images", "queries", "heads", "channels", "points", "reference_size")
        return {
            "storage": STORAGES.index(self.dtype),
            "spatial_shapes": torch.tensor(self.shapes),
            "misaligned": int(self.misaligned),
            **{name: getattr(self, name) for name in sizes},
            **self.tensors,
        }

    def forward(self, driver: Driver, seed: int = 0) -> Tensor:
        output = driver("forward", {**self.inputs(), "seed": seed})["output"]
        return tensor_from(output, self.tensors["grad_output"].shape, self.dtype)

    def backward(
        self,
        driver: Driver,
        *,
        deterministic: bool = False,
        of_reference: bool = True,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Gradients by the name of the input."""
        of_reference = of_reference and self.reference_size > 0
        flags = {"deterministic": int(deterministic), "needs_reference_gradient": int(of_reference)}
        results = driver("backward", {**self.inputs(), **flags, "seed": seed})
        points, weights = self.sampling_names()
        names = {"value": "grad_value", points: "grad_points", weights: "grad_weights"}
        if of_reference:
            names["reference"] = "grad_reference"
        return {
            name: tensor_from(results[key], self.tensors[name].shape, self.tensors[name].dtype)
            for name, key in names.items()
        }

    def sampling_names(self) -> tuple[str, str]:
        return ("offsets", "logits") if self.reference_size else ("locations", "weights")

    def exactly(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and gradients by PyTorch in float64."""
        inputs = {name: tensor.double() for name, tensor in self.tensors.items()}
        grad_output = inputs.pop("grad_output")
        for tensor in inputs.values():
            tensor.requires_grad_()
        if self.reference_size:
            locations = deformable_sampling_locations(
                inputs["reference"], inputs["offsets"], self.shapes
            )
            weights = softmax_over_points(inputs["logits"])
        else:
            locations, weights = inputs["locations"], inputs["weights"]
        output = sample_by_grid_sample(inputs["value"], self.shapes, locations, weights)
        gradients = torch.autograd.grad(output, list(inputs.values()), grad_output)
        return output.detach(), dict(zip(inputs, gradients, strict=True))


def _check_close(ours: Tensor, exact: Tensor, tolerance: float, name: str) -> None:
    scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    assert ours.shape == exact.shape
    assert ours.isfinite().all(), name
    error = (ours.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= tolerance * scale, f"{name}: {error} of {scale}"


def _check(problem: Problem, driver: Driver, **options: Any) -> None:
    """Forward and backward; gradients of the sampling are float32 where the value is 16-bit."""
    exact, exact_gradients = problem.exactly()
    tolerance = TOLERANCES[str(problem.dtype).removeprefix("torch.")]
    _check_close(problem.forward(driver), exact, tolerance, "output")
    for name, gradient in problem.backward(driver, **options).items():
        is_value = name == "value"
        real_tolerance = 1e-11 if problem.dtype is torch.float64 else 1e-5
        _check_close(
            gradient, exact_gradients[name], tolerance if is_value else real_tolerance, name
        )


# Group of lanes, rounds of points and remainders differ: with G lanes (D divided by the 4 or 8
# channels of 16 bytes), rounds of G points are unrolled, the rest is not.
SHAPES = {
    "standard": Problem(PYRAMID, images=2),
    "narrow": Problem(PYRAMID[:2], channels=16, points=8),
    "wide": Problem(PYRAMID, channels=64),
    "last round not full": Problem(PYRAMID[:3], points=4, queries=17, heads=1),
    "no full round": Problem([(3, 5)], channels=64, points=3),
    "many points": Problem([*PYRAMID, (2, 3)], channels=16, points=8, queries=3),
    "any channels": Problem(PYRAMID[:3], channels=5, points=1, images=2, heads=3),
    "more channels than lanes": Problem(PYRAMID[:2], channels=70, points=2, queries=2, heads=1),
    "more points than lanes": Problem([*PYRAMID, (2, 3)], channels=8, points=8, queries=3, heads=1),
    "one of everything": Problem([(1, 1)], queries=1, heads=1, channels=1, points=1),
    "one query": Problem(PYRAMID, queries=1),
    "thin levels": Problem([(1, 6), (7, 1), (1, 1)], images=3),
}


@pytest.mark.parametrize("reference_size", [0, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_sizes_in_single_precision(driver: Driver, name: str, reference_size: int) -> None:
    _check(replace(SHAPES[name], reference_size=reference_size).filled(), driver)


@pytest.mark.parametrize(
    "name", ["standard", "narrow", "wide", "last round not full", "any channels"]
)
@pytest.mark.parametrize(("dtype", "reference_size"), [(torch.float16, 0), (torch.bfloat16, 2)])
def test_half_precision_values(
    driver: Driver, dtype: torch.dtype, name: str, reference_size: int
) -> None:
    _check(replace(SHAPES[name], dtype=dtype, reference_size=reference_size).filled(), driver)


@pytest.mark.parametrize("reference_size", [0, 2, 4])
@pytest.mark.parametrize("name", ["any channels", "more channels than lanes"])
def test_double_precision(driver: Driver, name: str, reference_size: int) -> None:
    problem = replace(SHAPES[name], dtype=torch.float64, reference_size=reference_size)
    _check(problem.filled(), driver)


@pytest.mark.parametrize("reference_size", [2, 4])
def test_gradient_of_the_reference_is_optional(driver: Driver, reference_size: int) -> None:
    problem = replace(SHAPES["standard"], reference_size=reference_size).filled()
    without = problem.backward(driver, of_reference=False)
    whole = problem.backward(driver)
    assert whole.keys() - without.keys() == {"reference"}
    for name, gradient in without.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-6, atol=1e-6)


def test_points_on_the_borders(driver: Driver) -> None:
    """Pixel coordinates -1, -1/2, 0, W - 1, W - 1/2 and W of an 8 x 4 and a 1 x 1 level, exactly.

    Sizes are powers of two, so that no location is rounded.
    """
    problem = Problem([(4, 8), (1, 1)], queries=36, heads=1, points=1, channels=16).filled()
    for level, (height, width) in enumerate(problem.shapes):
        x, y = (
            (torch.tensor([-1, -0.5, 0, size - 1, size - 0.5, size]) + 0.5) / size
            for size in (width, height)
        )
        problem.tensors["locations"][0, :, 0, level, 0] = torch.cartesian_prod(x, y)
    _check(problem, driver)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -3e38])
@pytest.mark.parametrize("reference_size", [0, 2, 4])
def test_locations_that_are_no_place(driver: Driver, bad: float, reference_size: int) -> None:
    problem = replace(SHAPES["standard"], reference_size=reference_size).filled()
    points = problem.tensors[problem.sampling_names()[0]]
    points[:, 1, :, 0, 2] = bad
    points[0, 2, 0, 1, 3, 0] = bad
    if reference_size:
        problem.tensors["reference"][0, 3, 2, reference_size - 1] = bad
    _check(problem, driver)


@pytest.mark.parametrize("name", ["standard", "any channels", "wide"])
@pytest.mark.parametrize("reference_size", [0, 4])
def test_the_order_of_threads_changes_nothing_but_last_bits(
    driver: Driver, name: str, reference_size: int
) -> None:
    problem = replace(SHAPES[name], reference_size=reference_size).filled()
    output, gradients = problem.forward(driver), problem.backward(driver)
    assert problem.forward(driver, seed=1).equal(output)
    for name, gradient in problem.backward(driver, seed=1).items():
        if name == "value":
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-5)
        else:
            assert gradient.equal(gradients[name]), name


# Deterministic backward --------------------------------------------------------------------------


def crowded(**changes: Any) -> Problem:
    """Many queries sample few tokens, so that sums depend on the order of their terms."""
    return replace(Problem([(2, 2), (1, 1)], heads=1, queries=12, channels=8), **changes).filled()


@pytest.mark.parametrize(
    ("dtype", "reference_size"), [*((dtype, 0) for dtype in STORAGES), (torch.float32, 4)]
)
def test_deterministic_backward(driver: Driver, dtype: torch.dtype, reference_size: int) -> None:
    _check(crowded(dtype=dtype, reference_size=reference_size), driver, deterministic=True)


@pytest.mark.parametrize("reference_size", [0, 4])
def test_deterministic_backward_gives_the_same_bits_in_any_order(
    driver: Driver, reference_size: int
) -> None:
    problem = crowded(reference_size=reference_size)
    runs = [problem.backward(driver, deterministic=True, seed=seed) for seed in (0, 1)]
    for run in runs[1:]:
        assert all(run[name].equal(runs[0][name]) for name in run)
    # The same runs without it differ, or this test would show nothing.
    others = [problem.backward(driver, seed=seed)["value"] for seed in (0, 1)]
    assert not all(other.equal(others[0]) for other in others[1:])


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_deterministic_backward_knows_no_fixed_scale(driver: Driver, factor: float) -> None:
    """The unit follows the gradient: powers of two change nothing but the exponent."""
    problem = crowded()
    gradient = problem.backward(driver, deterministic=True)["value"]
    problem.tensors["grad_output"] *= factor
    scaled = problem.backward(driver, deterministic=True)["value"]
    assert scaled.equal(gradient * factor)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_deterministic_backward_does_not_hide_what_is_not_finite(
    driver: Driver, bad: float
) -> None:
    problem = crowded()
    problem.tensors["grad_output"][0, 3, 1] = bad
    assert problem.backward(driver, deterministic=True)["value"].isnan().all()
    problem.tensors["grad_output"].zero_()
    assert problem.backward(driver, deterministic=True)["value"].eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_deterministic_backward_does_not_hide_a_softmax_that_fails(
    driver: Driver, bad: float, dtype: torch.dtype
) -> None:
    """NaN becomes a number when it is turned into an integer. A logit of -inf is a weight of 0."""
    problem = crowded(reference_size=2, dtype=dtype)
    problem.tensors["logits"][0, 3, 0, 1, 2] = -math.inf
    assert problem.backward(driver, deterministic=True)["value"].isfinite().all()
    problem.tensors["logits"][0, 3, 0, 1, 2] = bad
    assert problem.backward(driver, deterministic=True)["value"].isnan().all()


# Views -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGES)
def test_values_that_begin_anywhere(driver: Driver, dtype: torch.dtype) -> None:
    """A contiguous view need not begin at a multiple of 16 bytes."""
    _check(replace(SHAPES["last round not full"], dtype=dtype, misaligned=True).filled(), driver)


# Nothing to do, and too much ---------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "sizes", [{"queries": 0}, {"images": 0}, {"points": 0}, {"channels": 0}, {"heads": 0}]
)
def test_nothing_to_do(driver: Driver, sizes: dict[str, int], deterministic: bool) -> None:
    problem = replace(SHAPES["standard"], reference_size=4, **sizes).filled()
    assert problem.forward(driver).eq(0).all()
    for name, gradient in problem.backward(driver, deterministic=deterministic).items():
        assert gradient.shape == problem.tensors[name].shape
        assert gradient.eq(0).all()


def test_too_many_levels(driver: Driver) -> None:
    _check(Problem([(1, 2)] * 32, points=1, queries=2).filled(), driver)
    with pytest.raises(MisuseError, match="at most 32 levels"):
        Problem([(1, 2)] * 33, points=1, queries=2).filled().forward(driver)


def test_too_large_an_image(driver: Driver) -> None:
    """2^15 x 2^11 tokens of 32 channels: refused by its sizes alone."""
    inputs = Problem([(1, 1)]).filled().inputs()
    inputs["spatial_shapes"] = torch.tensor([(2**15, 2**11)])
    with pytest.raises(MisuseError, match=r"at most 2\^31 - 256 elements"):
        driver("forward", inputs)
