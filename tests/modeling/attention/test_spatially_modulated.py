"""Attention under Gaussians: where they are, how wide, and what they do to the attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.gaussian_scale import (
    AxisProductScale,
    AxisScale,
    ConstantScale,
    GaussianScale,
    HeadScale,
)
from efficient_detr.modeling.attention.spatially_modulated import (
    CenterPrediction,
    ModulatedAttention,
    ScaleSelectiveModulatedAttention,
    SpatiallyModulatedAttention,
)
from efficient_detr.modeling.layers import MLP
from efficient_detr.structures import FeatureTokens
from tests.tiny_models import random_tokens, randomised

C, H, Q = 8, 2, 3
SCALES: list[type[GaussianScale]] = [ConstantScale, HeadScale, AxisScale, AxisProductScale]


def single(scale: type[GaussianScale] = AxisScale, **arguments: Any) -> Any:
    """Attention to one level of stride 8."""
    part = scale(channels=C, num_heads=H)
    return SpatiallyModulatedAttention(channels=C, num_heads=H, scale=part, stride=8, **arguments)


def several(scale: type[GaussianScale] = AxisScale, **arguments: Any) -> Any:
    """Attention to levels of stride 8 and 16."""
    return ScaleSelectiveModulatedAttention(
        channels=C,
        num_heads=H,
        scale=scale(channels=C, num_heads=H, num_levels=2),
        **{"strides": [8, 16], "distance_factors": [0.5, 2.0], **arguments},
    )


def inputs(batch: int = 1) -> dict[str, Tensor]:
    """Random arguments of the forward but for the memory."""
    return dict(
        query=torch.randn(batch, Q, C),
        position=torch.randn(batch, Q, C),
        reference_boxes=torch.rand(batch, Q, 2),
        layer_input=torch.randn(batch, Q, C),
    )


def predict_constants(attention: Any, offsets: list[list[float]], scales: list[float]) -> None:
    """Make a single-level attention predict the same head offsets and scales for every query."""
    with torch.no_grad():
        attention.head_offsets.weight.zero_()
        attention.head_offsets.bias.copy_(torch.tensor(offsets).flatten())
        if not isinstance(attention.scale, ConstantScale):
            attention.scale.projection.bias.copy_(torch.tensor(scales * H))


def by_hand(attention: Any, arguments: dict[str, Tensor], memory: FeatureTokens) -> Tensor:
    """The same from (Q, S, 2) distances, one softmax a level, and the logits written out."""
    logits, values = content_logits(attention, arguments, memory)
    columns = torch.cat([torch.arange(w).repeat(h) for h, w in memory.spatial_shapes])
    rows = torch.cat([torch.arange(h).repeat_interleave(w) for h, w in memory.spatial_shapes])
    cells = torch.stack([columns, rows], dim=-1)  # (S, 2)
    level_of = torch.repeat_interleave(
        torch.arange(len(memory.level_sizes)), torch.tensor(memory.level_sizes)
    )
    state = attention.norm(arguments["layer_input"])
    levels = len(memory.level_sizes)
    offsets = attention.head_offsets(state).unflatten(-1, (levels, H, 2))  # (B, Q, L, H, 2)
    scales = attention.scale.projection(state).unflatten(-1, (levels, H, 2)) ** 2
    pixels = arguments["reference_boxes"][..., :2] * memory.image_sizes[:, None]
    mixed = torch.zeros_like(logits @ values)
    for level in range(levels):
        own = level_of == level
        center = pixels[:, :, None] / attention.strides[level] + offsets[:, :, level]
        squares = (center[:, :, :, None] - cells[own]) ** 2 * scales[:, :, level, :, None]
        factor = attention.distance_factors[level]
        gaussian = -factor * squares.sum(-1).transpose(1, 2) / attention.beta  # (B, H, Q, S_l)
        masked = (logits[..., own] + gaussian).masked_fill(
            memory.padding_mask[:, None, None, own], -math.inf
        )
        share = attention.level_weights(arguments["layer_input"])[:, None, :, level, None]
        mixed = mixed + share * (masked.softmax(-1) @ values[:, :, own])
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))


def content_logits(
    attention: Any, arguments: dict[str, Tensor], memory: FeatureTokens
) -> tuple[Tensor, Tensor]:
    """Scaled products of queries and keys (B, H, Q, S), and values (B, H, S, D)."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    sources = [
        arguments["query"] + arguments["position"],
        memory.features + memory.positions,
        memory.features,
    ]
    query, key, value = (
        (source @ weight.T + bias).unflatten(2, (H, C // H)).transpose(1, 2)
        for source, weight, bias in zip(sources, weights, biases, strict=True)
    )
    return query @ key.transpose(2, 3) / math.sqrt(C // H), value


# The Gaussian ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "numbers", "expected"),
    [
        # Squared distances from the centre (5, 0.5) to the cell (3, 2): 4 and 2.25.
        (ConstantScale, [], -(4 + 2.25) / 8),
        (HeadScale, [2.0], -(4 * 4 + 4 * 2.25) / 8),
        (AxisScale, [2.0, -3.0], -(4 * 4 + 9 * 2.25) / 8),
        (AxisProductScale, [2.0, -3.0, 0.5], -(4 * 4 + 9 * 2.25 + 0.25 * 4 * 2.25) / 8),
    ],
)
def test_gaussian_at_a_cell(
    scale: type[GaussianScale], numbers: list[float], expected: float
) -> None:
    """An image of 64 x 32 pixels has 8 x 4 cells of stride 8: (1/2, 1/4) is at (4, 1) cells."""
    memory = random_tokens([(4, 8)])
    attention = single(scale)
    predict_constants(attention, [[1.0, -0.5], [0.0, 0.0]], numbers)
    arguments = inputs()
    reference = torch.tensor([[[0.5, 0.25, 0.1, 0.1]]]).expand(1, Q, 4)  # boxes work as well
    log_gaussian = attention.log_gaussian(arguments["layer_input"], reference, memory)
    assert log_gaussian.shape == (1, H, Q, 32)
    torch.testing.assert_close(
        log_gaussian[0, 0, :, 2 * 8 + 3], torch.full((Q,), expected), atol=1e-6, rtol=0
    )
    # The other head has no offset: its centre is the cell (4, 1) itself.
    torch.testing.assert_close(log_gaussian[0, 1, :, 8 + 4], torch.zeros(Q))


def test_gaussians_start_two_cells_wide() -> None:
    """exp(-d^2 / 8) = exp(-d^2 / (2 * 2^2)), whatever the query."""
    attention = single()
    with torch.no_grad():
        attention.head_offsets.weight.zero_()
        attention.head_offsets.bias.zero_()
    memory = random_tokens([(4, 8)])
    reference = torch.zeros(1, Q, 2)  # the centre is the cell (0, 0)
    gaussian = attention.log_gaussian(inputs()["layer_input"], reference, memory).exp()
    expected = torch.tensor([math.exp(-x * x / 8) for x in range(8)]).expand(H, Q, 8)
    torch.testing.assert_close(gaussian[0, :, :, :8], expected)


def test_centers_count_in_cells_of_the_unpadded_image() -> None:
    """(1/2, 1/2) of 40 x 24 pixels in a batch of 64 x 32: at (20, 12) pixels, whatever the pad."""
    memory = random_tokens([(4, 8), (2, 4)], batch=2, sizes=[(32, 64), (24, 40)])
    attention = several()
    with torch.no_grad():
        attention.head_offsets.weight.zero_()
        attention.head_offsets.bias.copy_(torch.arange(8.0))
    centers = attention.centers(inputs(2)["layer_input"], torch.full((2, Q, 2), 0.5), memory)
    assert centers.shape == (2, 2, H, Q, 2)
    # Offsets come by level, then by head, as (x, y).
    expected = torch.tensor(
        [[[2.5 + 0, 1.5 + 1], [2.5 + 2, 1.5 + 3]], [[1.25 + 4, 0.75 + 5], [1.25 + 6, 0.75 + 7]]]
    )
    torch.testing.assert_close(centers[1, :, :, 0], expected)
    torch.testing.assert_close(centers[0, 0, 0, 0], torch.tensor([4.0, 2.0 + 1]))


def test_each_level_has_a_factor_on_distances() -> None:
    memory = random_tokens([(4, 8), (2, 4)])
    attention = several()
    with torch.no_grad():
        attention.head_offsets.weight.zero_()
        attention.head_offsets.bias.zero_()
    reference = torch.zeros(1, Q, 2)
    log_gaussian = attention.log_gaussian(inputs()["layer_input"], reference, memory)
    # The cell (1, 0) of each level: its squared distance from the centre is 1.
    fine, coarse = log_gaussian[0, 0, 0, 1], log_gaussian[0, 0, 0, 32 + 1]
    torch.testing.assert_close(torch.stack([fine, coarse]), torch.tensor([-0.5 / 8, -2.0 / 8]))


@pytest.mark.parametrize("scale", SCALES)
def test_scales_are_squares_of_predictions(scale: type[GaussianScale]) -> None:
    attention = randomised(several(scale))
    scales = attention.squared_scales(inputs(2)["layer_input"])
    assert scales.shape == (2, 2, H, Q, scale.numbers)
    assert scales.ge(0).all()
    if scale is ConstantScale:
        assert scales.eq(1).all() and not list(attention.scale.parameters())


# The attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [single, several])
def test_formula(make: Any) -> None:
    attention = randomised(make()).eval()
    shapes = [(4, 8), (2, 4)][: attention.num_levels]
    memory = random_tokens(shapes, batch=2, sizes=[(32, 64), (20, 40)])
    arguments = inputs(2)
    output = attention(**arguments, memory=memory)
    torch.testing.assert_close(output, by_hand(attention, arguments, memory), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("make", [single, several])
def test_attention_weights_are_those_of_the_forward(make: Any, scale: Any) -> None:
    attention = randomised(make(scale)).eval()
    shapes = [(4, 8), (2, 4)][: attention.num_levels]
    memory = random_tokens(shapes, batch=2, sizes=[(32, 64), (20, 40)])
    arguments = inputs(2)
    weights = attention.attention_weights(**arguments, memory=memory)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, H, Q))
    padded = memory.padding_mask[:, None, None].expand_as(weights)
    assert weights[padded].eq(0).all() and padded.any()
    _, values = content_logits(attention, arguments, memory)
    torch.testing.assert_close(
        attention.merge(weights @ values),
        attention(**arguments, memory=memory),
        atol=1e-5,
        rtol=1e-5,
    )


def test_narrow_gaussians_leave_nothing_but_the_center() -> None:
    attention = single()
    predict_constants(attention, [[0.0, 0.0]] * H, [30.0, 30.0])
    memory = random_tokens([(4, 8)])
    arguments = inputs()
    arguments["reference_boxes"] = torch.tensor([[[0.5, 0.25]] * Q])  # the cell (4, 1)
    weights = attention.attention_weights(**arguments, memory=memory)
    torch.testing.assert_close(weights[..., 8 + 4], torch.ones(1, H, Q))


@pytest.mark.parametrize("make", [single, several])
def test_padding_changes_nothing(make: Any) -> None:
    attention = randomised(make()).eval()
    shapes, larger = [(2, 4), (1, 2)], [(4, 6), (2, 3)]
    count = attention.num_levels
    alone = random_tokens(shapes[:count], stride=8)
    padded = random_tokens(larger[:count], stride=8, sizes=[(16, 32)])
    for name in ("features", "positions"):
        parts = padded.split(getattr(padded, name))
        for part, source, (height, width), shape in zip(
            parts, alone.split(getattr(alone, name)), shapes, larger, strict=False
        ):
            part.unflatten(1, shape)[:, :height, :width] = source.unflatten(1, (height, width))
    arguments = inputs()
    torch.testing.assert_close(
        attention(**arguments, memory=padded),
        attention(**arguments, memory=alone),
        atol=1e-5,
        rtol=1e-5,
    )


def test_images_of_a_batch_have_their_own_level_weights() -> None:
    """The published code uses those of the first image for all."""
    attention = randomised(several(), std=1.0).eval()
    memory = random_tokens([(4, 8), (2, 4)], batch=2)
    arguments = inputs(2)
    shares = attention.level_weights(arguments["layer_input"])
    assert (shares[0] - shares[1]).abs().max() > 0.05
    together = attention(**arguments, memory=memory)
    for image in range(2):
        tensors = {
            field.name: getattr(memory, field.name)[image : image + 1]
            for field in dataclasses.fields(memory)
            if field.name != "spatial_shapes"
        }
        alone = dataclasses.replace(memory, **tensors)
        own = {name: tensor[image : image + 1] for name, tensor in arguments.items()}
        torch.testing.assert_close(
            attention(**own, memory=alone)[0], together[image], atol=1e-5, rtol=1e-5
        )


def test_level_weights_weigh_levels() -> None:
    attention = randomised(several()).eval()
    with torch.no_grad():
        attention.level_selection.weight.zero_()
        attention.level_selection.bias.copy_(torch.tensor([math.log(3.0), 0.0]))
    memory = random_tokens([(4, 8), (2, 4)])
    arguments = inputs()
    torch.testing.assert_close(
        attention.level_weights(arguments["layer_input"]),
        torch.tensor([0.75, 0.25]).expand(1, Q, 2),
    )
    weights = attention.attention_weights(**arguments, memory=memory)
    torch.testing.assert_close(weights[..., :32].sum(-1), torch.full((1, H, Q), 0.75))


def test_layer_input_steers_and_content_does_not() -> None:
    """Centres and scales follow from the layer's input, before self-attention."""
    attention = randomised(single()).eval()
    memory = random_tokens([(4, 8)])
    arguments = inputs()
    before = attention(**arguments, memory=memory)
    arguments["layer_input"] = torch.randn(1, Q, C)
    assert (attention(**arguments, memory=memory) - before).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_mixed_precision_keeps_far_centers_finite(
    dtype: torch.dtype, scale: type[GaussianScale]
) -> None:
    """A squared distance of 2000 cells is beyond the range of float16."""
    attention = several(scale).eval()
    with torch.no_grad():
        attention.head_offsets.bias.fill_(2000.0)
    memory = random_tokens([(4, 8), (2, 4)])
    arguments = inputs()
    full = attention(**arguments, memory=memory)
    with torch.autocast("cpu", dtype=dtype):
        output = attention(**arguments, memory=memory)
    assert output.isfinite().all()
    torch.testing.assert_close(output.float(), full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("make", [single, several])
def test_every_parameter_gets_a_gradient(make: Any, scale: type[GaussianScale]) -> None:
    attention = randomised(make(scale, center_prediction=CenterPrediction(channels=C)))
    shapes = [(4, 8), (2, 4)][: attention.num_levels]
    arguments = inputs()
    points = attention.predict_reference_logits(arguments["layer_input"])
    arguments["reference_boxes"] = points.sigmoid()
    attention(**arguments, memory=random_tokens(shapes)).square().sum().backward()
    silent = [
        name
        for name, parameter in attention.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert not silent


def test_gradients_are_right() -> None:
    """Also of the centres, through masked columns and rows."""
    attention = randomised(several()).double()
    memory = random_tokens([(3, 4), (2, 2)], sizes=[(20, 28)])
    memory = dataclasses.replace(
        memory, features=memory.features.double(), positions=memory.positions.double()
    )
    arguments = {name: tensor.double() for name, tensor in inputs().items()}

    def attend(reference: Tensor, layer_input: Tensor) -> Tensor:
        changed = {**arguments, "reference_boxes": reference, "layer_input": layer_input}
        return attention(**changed, memory=memory)

    leaves = (arguments["reference_boxes"], arguments["layer_input"])
    assert torch.autograd.gradcheck(attend, [leaf.requires_grad_() for leaf in leaves])


# Centre prediction -------------------------------------------------------------------------------


def test_center_prediction() -> None:
    prediction = CenterPrediction(channels=C)
    assert [tuple(layer.weight.shape) for layer in prediction.layers] == [(C, C), (C, C), (2, C)]
    attention = randomised(single(center_prediction=prediction))
    layer_input = inputs()["layer_input"]
    assert attention.predicts_references and attention.needs_references
    torch.testing.assert_close(
        attention.predict_reference_logits(layer_input), prediction(attention.norm(layer_input))
    )


def test_without_center_prediction() -> None:
    attention = single()
    assert not attention.predicts_references
    assert attention.predict_reference_logits(inputs()["layer_input"]) is None
    arguments: dict[str, Any] = {**inputs(), "reference_boxes": None}
    with pytest.raises(ConfigError, match="SpatiallyModulatedAttention needs reference points"):
        attention(**arguments, memory=random_tokens([(4, 8)]))


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(strides=[8, 16, 32]), "2 distance_factors for 3 strides"),
        (dict(strides=[8, 0]), "numbers above 0"),
        (dict(beta=0.0), "numbers above 0"),
        (dict(strides=[8], distance_factors=[1.0]), "scale AxisScale has num_levels=2"),
        (dict(center_prediction=MLP(sizes=[C, 4])), r"must end in 2 features \(x, y\)"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        several(**arguments)


def test_scale_for_other_heads() -> None:
    with pytest.raises(ConfigError, match="num_heads=2, but its scale HeadScale has num_heads=4"):
        SpatiallyModulatedAttention(
            channels=C, num_heads=2, scale=HeadScale(channels=C, num_heads=4)
        )


@pytest.mark.parametrize("method", ["level_weights", "mix_levels"])
def test_base_class_is_abstract(method: str) -> None:
    attention = ModulatedAttention(
        channels=C,
        num_heads=H,
        dropout=0.0,
        scale=AxisScale(channels=C, num_heads=H),
        strides=[8],
        distance_factors=[1.0],
        beta=8.0,
        center_prediction=None,
    )
    arguments = [torch.zeros(1, Q, C)] * (2 if method == "mix_levels" else 1)
    with pytest.raises(NotImplementedError, match=f"ModulatedAttention does not define {method}"):
        getattr(attention, method)(*arguments)


def test_base_scale_is_abstract() -> None:
    with pytest.raises(NotImplementedError, match="GaussianScale does not define forward"):
        GaussianScale(channels=C)(torch.zeros(1, Q, C))
