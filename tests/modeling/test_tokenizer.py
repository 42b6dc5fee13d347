"""Tokens of a small padded batch, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.position import SinePositionEmbedding
from efficient_detr.modeling.tokenizer import (
    FeatureTokenizer,
    LevelFeatureTokenizer,
    cell_centers,
    resize_mask,
    valid_size,
)
from efficient_detr.structures import FeatureTokens
from tests.tiny_models import padding_mask

SHAPES = [(8, 16), (4, 8), (2, 4), (1, 2)]
STARTS = [0, 128, 160, 168]  # first token of each level; 170 in all


def build_tokens() -> tuple[FeatureTokens, list[torch.Tensor], LevelFeatureTokenizer]:
    """A batch of 64 x 128 pixels: one full image, and one of 32 rows and 80 columns."""
    tokenizer = LevelFeatureTokenizer(
        position_embedding=SinePositionEmbedding(channels=4, offset=-0.5), channels=4, num_levels=4
    )
    maps = [torch.randn(2, 4, *shape) for shape in SHAPES]
    return tokenizer(maps, padding_mask([(64, 128), (32, 80)], (64, 128))), maps, tokenizer


def test_features_are_flattened_row_by_row_level_by_level() -> None:
    tokens, maps, _ = build_tokens()
    assert tokens.spatial_shapes == SHAPES
    assert tokens.features.shape == (2, 170, 4)
    for level, (start, (_, width)) in enumerate(zip(STARTS, SHAPES, strict=True)):
        row, column = SHAPES[level][0] - 1, 0
        token = tokens.features[:, start + row * width + column]
        assert torch.equal(token, maps[level][:, :, row, column])
        assert torch.equal(tokens.level(level), maps[level])


def test_padding_mask_of_each_level() -> None:
    """A cell takes the value of the pixel at i * stride.

    Stride 8: 4 rows and 10 columns of the image. Stride 16: rows 0 and 16 are below 32, columns 0
    to 64 below 80. Stride 32: row 0 only, columns 0, 32 and 64. Stride 64: row 0, columns 0 and 64,
    so that the whole level counts as image.
    """
    tokens, _, _ = build_tokens()
    assert not tokens.padding_mask[0].any()
    valid = [(4, 10), (2, 5), (1, 3), (1, 2)]
    masks = tokens.split(tokens.padding_mask)
    for level, (rows, columns) in enumerate(valid):
        expected = torch.ones(SHAPES[level], dtype=torch.bool)
        expected[:rows, :columns] = False
        assert torch.equal(masks[level][1].unflatten(0, SHAPES[level]), expected)


def test_valid_ratios_are_width_then_height() -> None:
    tokens, _, _ = build_tokens()
    assert tokens.valid_ratios[0].tolist() == [[1, 1]] * 4
    assert tokens.valid_ratios[1].tolist() == [[0.625, 0.5], [0.625, 0.5], [0.75, 0.5], [1, 1]]


def test_reference_points() -> None:
    tokens, _, _ = build_tokens()
    points = tokens.reference_points
    assert points.shape == (2, 170, 4, 2)
    # The full image: the cell centre, the same on every level.
    expected = torch.tensor([3.5 / 16, 2.5 / 8]).expand(4, 2)
    torch.testing.assert_close(points[0, 2 * 16 + 3], expected)
    # The smaller image: the first cell of level 0 is at (0.5 / 10, 0.5 / 4) of the image, which is
    # that times (valid columns / columns, valid rows / rows) of the padded map of each level.
    x, y = 0.5 / 10, 0.5 / 4
    expected = torch.tensor([[0.625 * x, y / 2], [0.625 * x, y / 2], [0.75 * x, y / 2], [x, y]])
    torch.testing.assert_close(points[1, 0], expected)
    # Padding in column 15: at 15.5 / 10 of the image's width, beyond a level without padding.
    expected = 15.5 / 10 * torch.tensor([0.625, 0.625, 0.75, 1])
    torch.testing.assert_close(points[1, 15, :, 0], expected)


def test_positions_are_the_sine_embedding_plus_the_level() -> None:
    tokens, _, tokenizer = build_tokens()
    masks = tokens.split(tokens.padding_mask)
    for level, positions in enumerate(tokens.split(tokens.positions)):
        mask = masks[level].unflatten(1, SHAPES[level])
        sine = tokenizer.position_embedding(mask).flatten(2).transpose(1, 2)
        torch.testing.assert_close(positions, sine + tokenizer.level_embedding[level])


def test_resize_mask_takes_the_nearest_pixel_above_and_left() -> None:
    """5 pixels to 3 cells: pixels 0, floor(5/3) = 1 and floor(10/3) = 3."""
    mask = torch.tensor([[[False, False, False, True, True]]])
    assert resize_mask(mask, (1, 3)).tolist() == [[[False, False, True]]]
    assert resize_mask(mask, (2, 5)).tolist() == [mask[0].tolist() * 2]


def test_valid_size_is_width_then_height() -> None:
    mask = padding_mask([(2, 5), (4, 1)], (4, 6))
    assert valid_size(mask).tolist() == [[5, 2], [1, 4]]


def test_cell_centers() -> None:
    centers = cell_centers((2, 3), torch.device("cpu"))
    rows = [[[x + 0.5, y + 0.5] for x in range(3)] for y in range(2)]
    assert centers.tolist() == rows[0] + rows[1]


def plain(**changes: Any) -> FeatureTokenizer:
    embedding = SinePositionEmbedding(channels=4, offset=-0.5)
    return FeatureTokenizer(**{"position_embedding": embedding, "num_levels": 4, **changes})


def test_without_level_embedding() -> None:
    """DETR: the position is the sine embedding; all else is as with levels."""
    tokens, maps, _ = build_tokens()
    tokenizer = plain()
    assert not list(tokenizer.parameters())
    mask = padding_mask([(64, 128), (32, 80)], (64, 128))
    output = tokenizer(maps, mask)
    assert torch.equal(output.features, tokens.features)
    assert torch.equal(output.padding_mask, tokens.padding_mask)
    assert torch.equal(output.reference_points, tokens.reference_points)
    masks = output.split(output.padding_mask)
    for level, positions in enumerate(output.split(output.positions)):
        sine = tokenizer.position_embedding(masks[level].unflatten(1, SHAPES[level]))
        assert torch.equal(positions, sine.flatten(2).transpose(1, 2))


def test_image_sizes_are_width_then_height_in_pixels() -> None:
    tokens, _, _ = build_tokens()
    assert tokens.image_sizes.tolist() == [[128, 64], [80, 32]]
    assert tokens.image_sizes.dtype is torch.float32


@pytest.mark.parametrize(
    ("chained_levels", "width", "expected"),
    [
        (0, 5, ["..###", ".##", ".#"]),
        (1, 5, ["..###", ".##", ".#"]),
        (2, 5, ["..###", "..#", ".."]),
        (0, 8, ["..###", "..#", ".#"]),
        (1, 8, ["..###", "..#", ".."]),
        (2, 8, ["..###", "..#", ".."]),
    ],
)
def test_chained_levels(chained_levels: int, width: int, expected: list[str]) -> None:
    """Levels of 5, 3 and 2 cells over 20 pixels, the first `width` of which are image.

    Cell i of n takes the value at floor(20 i / n): level 0 sees pixels 0, 4, 8, 12, 16; level 1
    pixels 0, 6, 13; level 2 pixels 0, 10. From level 1 instead, level 2 sees its cells 0 and 1,
    pixels 0 and 6. And level 1 from level 0 sees its cells 0, 1, 3, which are pixels 0, 4, 12, so
    that level 2 sees pixels 0 and 4.
    """
    mask = torch.ones(1, 3, 20, dtype=torch.bool)
    mask[..., :width] = False
    shapes = [(1, 5), (1, 3), (1, 2)]
    masks = plain(num_levels=3, chained_levels=chained_levels).level_masks(mask, shapes)
    assert ["".join("#" if cell else "." for cell in m[0, 0].tolist()) for m in masks] == expected


def test_chained_masks_reach_the_tokens() -> None:
    """Sine positions, valid ratios and centres all follow from the masks of the levels."""
    shapes = [(1, 5), (1, 3), (1, 2)]
    maps = [torch.randn(1, 4, *shape) for shape in shapes]
    mask = torch.ones(1, 3, 20, dtype=torch.bool)
    mask[..., :8] = False
    tokens = plain(num_levels=3, chained_levels=1)(maps, mask)
    assert tokens.padding_mask[0, 8:].tolist() == [False, False]
    torch.testing.assert_close(
        tokens.valid_ratios[0], torch.tensor([[2 / 5, 1.0], [2 / 3, 1.0], [1.0, 1.0]])
    )
    tokens = plain(num_levels=3)(maps, mask)
    assert tokens.padding_mask[0, 8:].tolist() == [False, True]
    torch.testing.assert_close(tokens.valid_ratios[0, 2], torch.tensor([0.5, 1.0]))
    assert tokens.image_sizes.tolist() == [[8, 3]]


@pytest.mark.parametrize("chained_levels", [-1, 4])
def test_the_first_level_is_resized_from_the_image(chained_levels: int) -> None:
    message = rf"tokenizer.chained_levels={chained_levels} must be in \[0, num_levels=4\)"
    with pytest.raises(ConfigError, match=message):
        plain(chained_levels=chained_levels)
