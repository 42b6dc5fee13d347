"""Multi-scale deformable attention: every implementation against a literal one, point by point."""

from __future__ import annotations

import math

import pytest
import torch

from efficient_detr.ops import deformable_sampling_locations
from efficient_detr.ops.deformable_attention_pytorch import (
    sample_by_grid_sample,
    softmax_over_points,
)
from efficient_detr.structures import SpatialShapes
from tests.ops.deformable_attention_cases import (
    COMPILED,
    FORMULATIONS,
    IMPLEMENTATIONS,
    ODD_SHAPES,
    Implementation,
    arguments,
    away_from_kinks,
    fused_arguments,
    gradients,
    literal,
)

formulations = pytest.mark.parametrize("run", FORMULATIONS, indirect=True)
implementations = pytest.mark.parametrize("run", IMPLEMENTATIONS, indirect=True)
compiled = pytest.mark.parametrize("run", COMPILED, indirect=True)
references = pytest.mark.parametrize("reference_size", [2, 4])

# (channels, points, heads): the shapes with kernels of their own (D 16, 32, 64 and L P = 16), and
# shapes that fit no vector.
SIZES = [
    (16, 4, 2),
    (32, 4, 8),
    (64, 4, 1),
    (8, 2, 3),
    (5, 3, 2),
    (1, 1, 1),
    (33, 5, 2),
    (96, 7, 1),
]
FOUR_LEVELS = [(5, 7), (3, 4), (2, 2), (1, 1)]


@formulations
@pytest.mark.parametrize("shapes", ODD_SHAPES)
def test_equals_the_definition(run: Implementation, shapes: SpatialShapes) -> None:
    inputs = arguments(shapes)
    torch.testing.assert_close(run.plain(*inputs), literal(*inputs))


@formulations
@references
@pytest.mark.parametrize("shapes", ODD_SHAPES)
def test_fused_equals_the_definition(
    run: Implementation, shapes: SpatialShapes, reference_size: int
) -> None:
    plain = arguments(shapes)
    torch.testing.assert_close(
        run.fused(*fused_arguments(plain, reference_size=reference_size)), literal(*plain)
    )


@formulations
@pytest.mark.parametrize("shapes", ODD_SHAPES)
@pytest.mark.parametrize(("queries", "points", "heads"), [(1, 1, 1), (4, 2, 5), (17, 3, 2)])
def test_gradients_agree(
    run: Implementation, shapes: SpatialShapes, queries: int, points: int, heads: int
) -> None:
    inputs = arguments(shapes, batch=3, queries=queries, points=points, heads=heads, channels=3)
    upstream = torch.randn(3, queries, heads * 3, dtype=torch.float64)
    ours = gradients(run.plain, upstream, *inputs)
    for our, expected in zip(
        ours, gradients(sample_by_grid_sample, upstream, *inputs), strict=True
    ):
        torch.testing.assert_close(our, expected)


@compiled
@pytest.mark.parametrize(("channels", "points", "heads"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_all_sizes_of_heads(
    run: Implementation,
    channels: int,
    points: int,
    heads: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Forward and gradients, plain and fused, against the definition in float64."""
    plain = arguments(FOUR_LEVELS, queries=9, heads=heads, channels=channels, points=points)
    plain = (plain[0], plain[1], away_from_kinks(plain[2], FOUR_LEVELS), plain[3])
    upstream = torch.randn(2, 9, heads * channels, dtype=torch.float64)
    cases = [(run.plain, sample_by_grid_sample, plain)] + [
        (
            run.fused,
            Implementation("grid_sample", "cpu").fused,
            fused_arguments(plain, reference_size=n),
        )
        for n in (2, 4)
    ]
    for function, reference, inputs in cases:
        rounded = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in inputs]
        exact = [x.double() if isinstance(x, torch.Tensor) else x for x in rounded]
        expected = [reference(*exact), *gradients(reference, upstream, *exact)]
        upstream_rounded = upstream.to(dtype)
        actual = [function(*rounded), *gradients(function, upstream_rounded, *rounded)]
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype is dtype
            scale = max(1.0, theirs.abs().max().item())
            assert (ours.double() - theirs).abs().max() <= tolerance * scale


@formulations
def test_hand_derived_samples(run: Implementation) -> None:
    """A 2 x 2 map with the values 1 2 / 3 4, centres at 1/4 and 3/4."""
    value = torch.tensor([1.0, 2, 3, 4]).reshape(1, 4, 1, 1)
    points = {
        (0.25, 0.25): 1.0,  # a centre
        (0.75, 0.25): 2.0,  # x runs along the row
        (0.5, 0.5): 2.5,  # the middle of all four
        (0.5, 0.75): 3.5,  # between the two of the lower row
        (0.0, 0.25): 0.5,  # on the border: half the token, half the zeros outside
        (0.0, 0.0): 0.25,  # on the corner
        (1.0, 1.0): 1.0,
        (-0.25, 0.25): 0.0,  # a whole pixel beyond the first centre
        (1.25, 0.75): 0.0,
        (0.75, 1.2): 0.4,  # y = 1.9 pixels: a tenth of the lower row
    }
    locations = torch.tensor(list(points)).reshape(1, -1, 1, 1, 1, 2)
    weights = torch.ones(1, len(points), 1, 1, 1)
    sampled = run.plain(value, [(2, 2)], locations, weights).flatten()
    torch.testing.assert_close(sampled, torch.tensor(list(points.values())))


@formulations
def test_levels_and_weights_add_up(run: Implementation) -> None:
    """Level 0 holds 10, level 1 holds 1 (twice); two points a level at the centre."""
    value = torch.tensor([10.0, 1, 1]).reshape(1, 3, 1, 1)
    locations = torch.full((1, 1, 1, 2, 2, 2), 0.5)
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).reshape(1, 1, 1, 2, 2)
    sampled = run.plain(value, [(1, 1), (1, 2)], locations, weights)
    assert sampled.item() == pytest.approx(0.3 * 10 + 0.7 * 1)


@implementations
def test_hand_derived_fused_sample(run: Implementation) -> None:
    """One row 0 1 2 3 with centres at 1/8, 3/8, 5/8, 7/8; two points, weights 1/4 and 3/4.

    Around the point x = 3/8, offsets of 1 and -0.5 cells sample 2 and 0.5: 0.25 * 2 + 0.75 * 0.5.
    In the box of centre 1/2 and width 1/2, offsets of 1 and -2 sample at 1/2 + 1/2 * 1/4 = 5/8 and
    1/2 - 2/2 * 1/4 = 1/4, that is 2 and 0.5 again.
    """
    value = torch.arange(4.0).reshape(1, 4, 1, 1)
    logits = torch.tensor([0.0, math.log(3.0)]).reshape(1, 1, 1, 1, 2)
    for reference, offsets in (
        ([0.375, 0.5], [[1.0, 0.0], [-0.5, 0.0]]),
        ([0.5, 0.5, 0.5, 0.3], [[1.0, 0.0], [-2.0, 0.0]]),
    ):
        sampled = run.fused(
            value,
            [(1, 4)],
            torch.tensor(reference).reshape(1, 1, 1, -1),
            torch.tensor(offsets).reshape(1, 1, 1, 1, 2, 2),
            logits,
        )
        assert sampled.item() == pytest.approx(0.25 * 2 + 0.75 * 0.5, abs=1e-6)


@formulations
def test_heads_and_images_stay_apart(run: Implementation) -> None:
    value, shapes, locations, weights = arguments([(4, 3), (2, 2)])
    whole = run.plain(value, shapes, locations, weights)
    for image in range(2):
        for head in range(3):
            one = run.plain(
                value[image : image + 1, :, head : head + 1],
                shapes,
                locations[image : image + 1, :, head : head + 1],
                weights[image : image + 1, :, head : head + 1],
            )
            torch.testing.assert_close(one[0], whole[image, :, 2 * head : 2 * head + 2])


@formulations
def test_gradients_are_those_of_the_output(run: Implementation) -> None:
    shapes = [(3, 2), (1, 2)]
    value, _, locations, weights = arguments(shapes, batch=1, queries=2, heads=2, points=2)
    locations = away_from_kinks(locations, shapes)
    for tensor in (value, locations, weights):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, p, w: run.plain(v, shapes, p, w), (value, locations, weights)
    )


@implementations
@references
def test_fused_gradients_are_those_of_the_output(run: Implementation, reference_size: int) -> None:
    shapes = [(3, 2), (1, 2)]
    value, _, locations, weights = arguments(shapes, batch=1, queries=2, heads=2, points=2)
    plain = (value, shapes, away_from_kinks(locations, shapes), weights)
    value, _, *sampling = fused_arguments(plain, reference_size=reference_size)
    tensors = [tensor.requires_grad_() for tensor in (value, *sampling)]
    assert torch.autograd.gradcheck(lambda v, *rest: run.fused(v, shapes, *rest), tensors)


@implementations
def test_fused_gradients_without_a_reference_gradient(run: Implementation) -> None:
    value, shapes, reference, *rest = fused_arguments(arguments([(4, 3), (2, 2)]), reference_size=4)
    tensors = [value, *rest]
    for tensor in tensors:
        tensor.requires_grad_()
    without = torch.autograd.grad(run.fused(value, shapes, reference, *rest).sum(), tensors)
    reference.requires_grad_()
    output = run.fused(value, shapes, reference, *rest)
    grad_value, grad_reference, *others = torch.autograd.grad(
        output.sum(), [value, reference, *rest]
    )
    assert grad_reference.abs().sum() > 0
    for ours, expected in zip(without, [grad_value, *others], strict=True):
        torch.testing.assert_close(ours, expected)


@formulations
def test_no_queries(run: Implementation) -> None:
    plain = arguments([(4, 3), (2, 2)], queries=0)
    for function, inputs in (
        (run.plain, plain),
        (run.fused, fused_arguments(plain, reference_size=2)),
    ):
        value = inputs[0].clone().requires_grad_()
        output = function(value, *inputs[1:])
        assert output.shape == (2, 0, 6)
        output.sum().backward()
        assert value.grad is not None and value.grad.eq(0).all()


@formulations
def test_gradients_on_borders(run: Implementation) -> None:
    """Exactly on centres, edges and one pixel outside, one-sided derivatives are grid_sample's.

    Level sizes are powers of two, so that these pixel coordinates are exact.
    """
    shapes = [(8, 4), (2, 2)]
    value, _, _, weights = arguments(shapes, queries=49, points=1, heads=1)
    locations = torch.empty(2, 49, 1, 2, 1, 2, dtype=torch.float64)
    for level, (height, width) in enumerate(shapes):
        places = [-1.5, -1.0, -0.5, 0.0, 1.0]
        x, y = ([*places, size - 1.0, float(size)] for size in (width, height))
        pixels = torch.cartesian_prod(*(torch.tensor(axis).double() for axis in (x, y)))
        locations[:, :, 0, level, 0] = (pixels + 0.5) / torch.tensor([width, height])
    upstream = torch.randn(2, 49, 2, dtype=torch.float64)
    ours = gradients(run.plain, upstream, value, shapes, locations, weights)
    theirs = gradients(sample_by_grid_sample, upstream, value, shapes, locations, weights)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected)


@formulations
def test_inference_mode(run: Implementation) -> None:
    inputs = arguments([(4, 3), (2, 2)])
    expected = run.plain(*inputs)
    with torch.inference_mode():
        torch.testing.assert_close(run.plain(*inputs), expected)


@formulations
def test_non_contiguous_arguments(run: Implementation) -> None:
    value, shapes, locations, weights = arguments([(4, 3), (2, 2)])
    expected = run.plain(value, shapes, locations, weights)
    transposed = value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    strided = torch.stack([locations, locations], dim=-1)[..., 0]
    reversed_weights = weights.flip(1).contiguous().flip(1).transpose(1, 2).contiguous()
    reversed_weights = reversed_weights.transpose(1, 2)
    for tensor in (transposed, strided, reversed_weights):
        assert not tensor.is_contiguous()
    torch.testing.assert_close(run.plain(transposed, shapes, strided, reversed_weights), expected)
    # A gradient that is one number, expanded.
    ours = gradients(run.plain, torch.ones(()).double().expand(2, 5, 6), *(
        transposed, shapes, strided, reversed_weights
    ))  # fmt: skip
    upstream = torch.ones(2, 5, 6, dtype=torch.float64)
    for actual, other in zip(
        ours, gradients(run.plain, upstream, value, shapes, locations, weights), strict=True
    ):
        torch.testing.assert_close(actual, other)


@formulations
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 7.0])
def test_locations_that_are_no_place_contribute_nothing(run: Implementation, bad: float) -> None:
    value, shapes, locations, weights = arguments([(4, 3), (2, 2)], dtype=torch.float32)
    without = weights.clone()
    without[:, 1, :, 0, 2] = 0
    expected = run.plain(value, shapes, locations, without)
    locations[:, 1, :, 0, 2] = bad
    locations[0, 1, 0, 0, 2, 0] = 0.5  # one coordinate alone is no place either
    torch.testing.assert_close(run.plain(value, shapes, locations, weights), expected)
    upstream = torch.randn_like(expected)
    ours = gradients(run.plain, upstream, value, shapes, locations, weights)
    theirs = gradients(run.plain, upstream, value, shapes, locations.nan_to_num(9, 9, 9), without)
    torch.testing.assert_close(ours[0], theirs[0])
    for gradient in ours[1:]:
        assert gradient.isfinite().all()
        assert gradient[:, 1, :, 0, 2].eq(0).all()


@formulations
@references
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("culprit", ["offset", "reference", "size"])
def test_fused_numbers_that_are_no_place_contribute_nothing(
    run: Implementation, reference_size: int, bad: float, culprit: str
) -> None:
    """The point or the reference samples nothing, and nothing becomes NaN."""
    if culprit == "size" and reference_size == 2:
        pytest.skip("a reference point has no size")
    value, shapes, reference, offsets, logits = fused_arguments(
        arguments([(4, 3), (2, 2)], dtype=torch.float32), reference_size=reference_size
    )
    lost = torch.zeros(offsets.shape[:-1], dtype=torch.bool)
    if culprit == "offset":
        offsets[:, 1, :, 0, 2, 0] = bad
        lost[:, 1, :, 0, 2] = True
    else:
        reference[:, 1, 0, 0 if culprit == "reference" else 3] = bad
        lost[:, 1, :, 0] = True
    locations = torch.rand(*lost.shape, 2)
    good = deformable_sampling_locations(
        reference.nan_to_num(0, 0, 0), offsets.nan_to_num(0, 0, 0), shapes
    )
    locations = torch.where(lost.unsqueeze(-1), 0.5, good)
    weights = softmax_over_points(logits).masked_fill(lost, 0)
    expected = sample_by_grid_sample(value, shapes, locations, weights)
    torch.testing.assert_close(run.fused(value, shapes, reference, offsets, logits), expected)
    ours = gradients(
        run.fused, torch.randn_like(expected), value, shapes, reference, offsets, logits
    )
    for gradient in ours:
        assert gradient.isfinite().all()
    assert ours[2][lost].eq(0).all()


@formulations
def test_huge_but_finite_values_stay_apart_from_places_outside(run: Implementation) -> None:
    """Points far outside read nothing, not even a number times zero that is large."""
    value, shapes, locations, weights = arguments([(4, 3), (2, 2)])
    outside = torch.full_like(locations, 50.0)
    output = run.plain(value * 1e300, shapes, outside, weights)
    assert output.eq(0).all()


@pytest.mark.parametrize("run", COMPILED[:1], indirect=True)  # CPU
def test_results_do_not_depend_on_the_number_of_threads(run: Implementation) -> None:
    shapes = [(13, 11), (6, 5)]
    plain = arguments(shapes, queries=60, heads=4, channels=16, points=8, dtype=torch.float32)
    fused = fused_arguments(plain, reference_size=4)
    upstream = torch.randn(2, 60, 64)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                [
                    run.plain(*plain),
                    run.fused(*fused),
                    *gradients(run.plain, upstream, *plain),
                    *gradients(run.fused, upstream, *fused),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            assert torch.equal(ours, expected)


@compiled
def test_deterministic_gradients(run: Implementation) -> None:
    """Many queries that add to the same few tokens."""
    plain = arguments([(3, 2)], queries=500, heads=2, channels=32, points=4, dtype=torch.float32)
    upstream = torch.randn(2, 500, 64)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(run.plain, upstream, *plain) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, again in zip(first, second, strict=True):
        assert torch.equal(ours, again)
