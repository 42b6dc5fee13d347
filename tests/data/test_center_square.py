"""The square in the middle of a picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from efficient_detr.data.center_square import CenterSquare
from efficient_detr.errors import ConfigError, UserError


def random_picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("image_size", "size", "resized", "corner"),
    [
        # 300 * 256 / 200 = 384; (384 - 224) / 2 = 80 and (256 - 224) / 2 = 16
        (224, (200, 300), (256, 384), (16, 80)),
        # 333 * 256 / 250 = 340.99 is cut to 340; (340 - 224) / 2 = 58
        (224, (333, 250), (340, 256), (58, 16)),
        # 384 * 8 / 7 = 438.86 is cut to 438; (438 - 384) / 2 = 27
        (384, (100, 100), (438, 438), (27, 27)),
        # 8 * 8 / 7 = 9.14; 9 * 11 / 10 = 9.9: half of one is rounded to the even 0
        (8, (10, 11), (9, 9), (0, 0)),
    ],
)
def test_place_of_the_square(
    image_size: int, size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    picture = random_picture(*size)
    square = CenterSquare(image_size=image_size)(picture)
    assert square.shape == (image_size, image_size, 3) and square.dtype == np.uint8
    whole = np.asarray(
        Image.fromarray(picture).resize(resized[::-1], resample=Image.Resampling.BICUBIC)
    )
    top, left = corner
    expected = whole[top : top + image_size, left : left + image_size]
    assert np.array_equal(square, expected)


def test_a_picture_of_one_colour_keeps_it() -> None:
    picture = np.full((50, 80, 3), (10, 200, 90), dtype=np.uint8)
    assert (CenterSquare(image_size=32)(picture) == (10, 200, 90)).all()


def test_what_lies_far_from_the_middle_plays_no_part() -> None:
    """A picture twice as wide as high: the outer quarters are cut off."""
    picture = random_picture(70, 140)
    changed = picture.copy()
    changed[:, :30] = changed[:, -30:] = 0
    square = CenterSquare(image_size=56)
    assert np.array_equal(square(picture), square(changed))
    changed[:, 60] = 0
    assert not np.array_equal(square(picture), square(changed))


def test_a_stripe_is_refused() -> None:
    with pytest.raises(UserError, match="404 x 4 pixels is too long and narrow"):
        CenterSquare(image_size=32)(random_picture(4, 404))


def test_a_square_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="preprocessing.image_size=0"):
        CenterSquare(image_size=0)
