"""Sine embeddings against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from efficient_detr.modeling.position import (
    BoxPositionEmbedding,
    SinePositionEmbedding,
    sine_embedding,
)


def test_sines_and_cosines_alternate() -> None:
    """Four features at temperature 100: wavelengths 2 pi and 2 pi * 100^(2/4) = 2 pi * 10."""
    a = 0.7
    embedded = sine_embedding(torch.tensor([a]), 4, 100.0)
    expected = [math.sin(a), math.cos(a), math.sin(a / 10), math.cos(a / 10)]
    assert embedded[0].tolist() == pytest.approx(expected)


def embed(
    mask: Tensor, channels: int = 4, temperature: float = 10000.0, offset: float = 0.0
) -> Tensor:
    module = SinePositionEmbedding(channels=channels, temperature=temperature, offset=offset)
    return module(mask)


def test_two_by_two_map_at_cell_centers() -> None:
    """Cells at 1/4 and 3/4 of the circle: angles pi/2 and 3 pi/2, sines 1 and -1, cosines 0."""
    embedded = embed(torch.zeros(1, 2, 2, dtype=torch.bool), offset=-0.5)[0]
    sine_y, cosine_y, sine_x, cosine_x = embedded
    torch.testing.assert_close(sine_y, torch.tensor([[1.0, 1], [-1, -1]]))
    torch.testing.assert_close(sine_x, torch.tensor([[1.0, -1], [1, -1]]))
    for cosine in (cosine_y, cosine_x):
        torch.testing.assert_close(cosine, torch.zeros(2, 2), atol=1e-5, rtol=0)


def test_two_by_two_map_without_offset() -> None:
    """Counts 1 and 2 of 2: angles pi and 2 pi, cosines -1 and 1."""
    _, cosine_y, _, cosine_x = embed(torch.zeros(1, 2, 2, dtype=torch.bool))[0]
    torch.testing.assert_close(cosine_y, torch.tensor([[-1.0, -1], [1, 1]]))
    torch.testing.assert_close(cosine_x, torch.tensor([[-1.0, 1], [-1, 1]]))


def test_temperature_sets_the_longest_wavelength() -> None:
    """Eight channels, four for y: the second pair turns 400^(2/4) = 20 times slower."""
    embedded = embed(torch.zeros(1, 1, 1, dtype=torch.bool), channels=8, temperature=400.0)
    slow = 2 * math.pi / 20
    expected = [0.0, 1.0, math.sin(slow), math.cos(slow)] * 2
    assert embedded.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_padding_does_not_change_the_position_of_image_cells() -> None:
    mask = torch.ones(1, 5, 7, dtype=torch.bool)
    mask[:, :3, :4] = False
    alone = embed(torch.zeros(1, 3, 4, dtype=torch.bool), channels=16, offset=-0.5)
    padded = embed(mask, channels=16, offset=-0.5)
    torch.testing.assert_close(padded[:, :, :3, :4], alone)
    assert padded.isfinite().all()


def test_shape_and_dtype() -> None:
    embedded = embed(torch.zeros(3, 5, 7, dtype=torch.bool), channels=12)
    assert embedded.shape == (3, 12, 5, 7)
    assert embedded.dtype is torch.float32


def test_channels_must_fit_two_axes_of_pairs() -> None:
    with pytest.raises(ValueError, match="multiple of 4, not 10"):
        SinePositionEmbedding(channels=10)


def test_box_embedding_is_ordered_y_x_w_h() -> None:
    """Two features a coordinate: sine and cosine of the coordinate's full turn."""
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0]])  # cx, cy, w, h
    embedded = BoxPositionEmbedding(channels=4)(box)
    assert embedded.shape == (1, 8)
    angles = [math.pi, math.pi / 2, 3 * math.pi / 2, 2 * math.pi]  # cy, cx, w, h
    expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
    assert embedded[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_box_embedding_stays_in_float32_under_autocast() -> None:
    """bfloat16 has 8 bits: it could not tell boxes apart that differ by less than 1/256."""
    boxes = torch.tensor([[0.5, 0.5, 0.1, 0.1], [0.501, 0.5, 0.1, 0.1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = BoxPositionEmbedding(channels=8)(boxes)
    assert first.dtype is torch.float32
    assert (first - second).abs().max() > 1e-3
