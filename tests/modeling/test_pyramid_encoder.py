"""The convolutional pyramid encoder: what neighbours exchange, and the memory it leaves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.pyramid_encoder import (
    CrossScaleExchange,
    PyramidEncoder,
    PyramidEncoderLayer,
    SeparateExchange,
    SharedExchange,
)
from efficient_detr.structures import TokenSelection
from tests.tiny_models import random_tokens, randomised

C = 4
SHAPES = [(5, 7), (3, 4), (2, 2)]
EXCHANGES: list[type[CrossScaleExchange]] = [SeparateExchange, SharedExchange]


def encoder(
    exchange: type[CrossScaleExchange] = SharedExchange,
    *,
    num_levels: int = 3,
    kernel_size: int = 3,
    layers: int = 2,
) -> Any:
    sizes = dict(channels=C, num_levels=num_levels, kernel_size=kernel_size)
    return PyramidEncoder(
        layers=[
            PyramidEncoderLayer(
                exchange=exchange(**sizes),
                feedforward=FeedForward(channels=C, hidden_channels=6),
                **sizes,
            )
            for _ in range(layers)
        ],
        channels=C,
        num_levels=num_levels,
    )


def maps_of_ones() -> list[Tensor]:
    return [torch.ones(1, C, *shape) for shape in SHAPES]


def centre_tap(exchange: CrossScaleExchange, pair: int, down: float, up: float) -> None:
    """Let the convolutions of a pair multiply by a number and do nothing else."""
    for convolution, factor in (
        (exchange.to_coarser(pair), down),
        (exchange.to_finer(pair), up),
    ):
        torch.nn.init.zeros_(convolution.weight)
        torch.nn.init.zeros_(convolution.bias)
        with torch.no_grad():
            convolution.weight[:, :, 1, 1] = factor


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_each_level_gets_what_its_neighbours_send(exchange: type[CrossScaleExchange]) -> None:
    """All maps are 1. Level 0 gets an up, level 2 a down, level 1 both."""
    part = exchange(channels=C, num_levels=3, kernel_size=3)
    separate = exchange is SeparateExchange
    centre_tap(part, 0, down=2.0, up=3.0)
    if separate:
        centre_tap(part, 1, down=5.0, up=7.0)
    fine, middle, coarse = part(maps_of_ones())
    torch.testing.assert_close(fine, torch.full_like(fine, 1 + 3))
    torch.testing.assert_close(middle, torch.full_like(middle, 1 + 2 + (7 if separate else 3)))
    torch.testing.assert_close(coarse, torch.full_like(coarse, 1 + (5 if separate else 2)))


def test_downwards_every_second_cell_is_taken() -> None:
    part = SharedExchange(channels=C, num_levels=2, kernel_size=3)
    centre_tap(part, 0, down=1.0, up=0.0)
    fine, coarse = torch.randn(1, C, 5, 7), torch.zeros(1, C, 3, 4)
    _, received = part([fine, coarse])
    torch.testing.assert_close(received, fine[:, :, ::2, ::2])


def test_upwards_corners_stay_corners() -> None:
    """Bilinear with aligned corners: 2 cells become 3 by a mean in between."""
    part = SharedExchange(channels=C, num_levels=2, kernel_size=3)
    centre_tap(part, 0, down=0.0, up=1.0)
    coarse = torch.tensor([[1.0, 3.0]]).expand(1, C, 1, 2)
    received, _ = part([torch.zeros(1, C, 1, 3), coarse])
    torch.testing.assert_close(received[0, 0], torch.tensor([[1.0, 2.0, 3.0]]))


def test_separate_convolutions_are_more() -> None:
    separate, shared = (
        sum(p.numel() for p in part(channels=C, num_levels=4, kernel_size=7).parameters())
        for part in EXCHANGES
    )
    assert shared == 2 * (C * 7 * 7 + C)
    assert separate == 3 * shared


def test_layer_by_hand() -> None:
    """The layer on maps: projection, depthwise, exchange, projection, norm, network, norm."""
    layer = randomised(encoder(SeparateExchange)).layers[0].eval()
    tokens = random_tokens(SHAPES, channels=C)
    maps = [tokens.level(level) for level in range(3)]
    positions = tokens.with_features(tokens.positions)
    convolved = [
        convolve(layer.input_projection(feature + positions.level(level)))
        for level, (convolve, feature) in enumerate(
            zip(layer.level_convolutions, maps, strict=True)
        )
    ]
    down = [layer.exchange.down[pair](convolved[pair]) for pair in range(2)]
    up = [
        F.interpolate(
            layer.exchange.up[pair](convolved[pair + 1]),
            SHAPES[pair],
            mode="bilinear",
            align_corners=True,
        )
        for pair in range(2)
    ]
    sums = [convolved[0] + up[0], convolved[1] + up[1] + down[0], convolved[2] + down[1]]
    expected = []
    for feature, mixed in zip(maps, sums, strict=True):
        residual = (feature + layer.output_projection(mixed)).flatten(2).transpose(1, 2)
        state = layer.convolution_norm(residual)
        expected.append(layer.feedforward_norm(state + layer.feedforward(state)))
    torch.testing.assert_close(layer(tokens), torch.cat(expected, dim=1), atol=1e-5, rtol=1e-5)


def test_memory_has_the_finest_level_on_the_next_grid() -> None:
    module = randomised(encoder()).eval()
    tokens = random_tokens(SHAPES, batch=2, channels=C, sizes=[(40, 56), (24, 32)])
    refined = tokens
    for layer in module.layers:
        refined = refined.with_features(layer(refined))
    memory = module(tokens).memory
    assert memory.spatial_shapes == [(3, 4), (3, 4), (2, 2)]
    torch.testing.assert_close(memory.level(0), module.reduction(refined.level(0)))
    for level in (1, 2):
        torch.testing.assert_close(memory.level(level), refined.level(level))
    for name in ("positions", "padding_mask"):
        fine, middle, coarse = tokens.split(getattr(tokens, name))
        expected = torch.cat([middle, middle, coarse], dim=1)
        torch.testing.assert_close(getattr(memory, name), expected)
    assert memory.padding_mask.any()
    ratios = tokens.valid_ratios
    torch.testing.assert_close(memory.valid_ratios, ratios[:, [1, 1, 2]])
    # Seen from its own level, the centre of cell (column 2, row 1) is (2.5 / 4, 1.5 / 3).
    cell = memory.reference_points[0, 1 * 4 + 2]
    expected = torch.tensor([2.5 / 4, 1.5 / 3]).expand(3, 2)
    torch.testing.assert_close(cell, expected)
    first, second = memory.split(memory.reference_points)[:2]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_parameter_gets_a_gradient(exchange: type[CrossScaleExchange]) -> None:
    module = randomised(encoder(exchange))
    module(random_tokens(SHAPES, channels=C)).memory.features.square().sum().backward()
    silent = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert not silent


def test_images_of_one_size_do_not_see_each_other() -> None:
    module = randomised(encoder()).eval()
    tokens = random_tokens(SHAPES, batch=2, channels=C)
    together = module(tokens).memory.features
    tensors = {
        field.name: getattr(tokens, field.name)[1:]
        for field in dataclasses.fields(tokens)
        if field.name != "spatial_shapes"
    }
    alone = module(dataclasses.replace(tokens, **tensors)).memory.features
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-5)


# Errors ------------------------------------------------------------------------------------------


def test_a_selection_is_refused() -> None:
    selection = TokenSelection([], torch.ones(1), torch.zeros(1, 53), [])
    with pytest.raises(ConfigError, match="takes no selection"):
        encoder()(random_tokens(SHAPES, channels=C), selection)


def test_levels_must_halve() -> None:
    with pytest.raises(ConfigError, match=r"after \(5, 7\) came \(2, 3\) instead of \(3, 4\)"):
        encoder()(random_tokens([(5, 7), (2, 3), (1, 2)], channels=C))


def test_levels_must_halve_without_layers() -> None:
    with pytest.raises(ConfigError, match="half the size"):
        encoder(layers=0, num_levels=2)(random_tokens([(4, 4), (4, 4)], channels=C))


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ConfigError, match="kernel_size=4 must be odd"):
        encoder(kernel_size=4)


@pytest.mark.parametrize("make", [SharedExchange, SeparateExchange])
def test_one_level_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="at least 2 levels"):
        make(channels=C, num_levels=1, kernel_size=3)
    with pytest.raises(ConfigError, match="PyramidEncoder needs at least 2 levels"):
        PyramidEncoder(layers=[], channels=C, num_levels=1)


@pytest.mark.parametrize("method", ["to_coarser", "to_finer"])
def test_base_exchange_is_abstract(method: str) -> None:
    part = CrossScaleExchange(channels=C, num_levels=2, kernel_size=3)
    with pytest.raises(NotImplementedError, match=f"does not define {method}"):
        getattr(part, method)(0)
