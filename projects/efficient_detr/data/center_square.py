"""The square in the middle of a picture, which ImageNet classifiers are evaluated on."""

from __future__ import annotations

import numpy as np
from PIL import Image

from efficient_detr.errors import ConfigError, UserError

_LARGEST_ASPECT_RATIO = 100

# The shorter side for a square of 224 pixels; other squares are the same part of the picture.
_SHORTER_SIDE = 256 / 224


class CenterSquare:
    """Resizes a picture and cuts the middle out.

    The shorter side becomes 8/7 of the square's, rounded down, by bicubic interpolation of 8-bit
    values: 256 for 224 pixels, 438 for 384. It is how DAT, DAT++ and Swin were evaluated, with
    torchvision's rounding of the longer side and of the square's place.

    Args:
        image_size: side of the square, in pixels.

    Raises:
        ConfigError: if that is less than one.
    """

    def __init__(self, *, image_size: int) -> None:
        if image_size < 1:
            raise ConfigError(f"preprocessing.image_size={image_size}: give 1 pixel or more.")
        self.image_size = image_size

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Resize and cut.

        Args:
            image: uint8 (H, W, 3).

        Returns:
            uint8 (image_size, image_size, 3).

        Raises:
            UserError: if one side is more than a hundred times as long as the other.
        """
        height, width = image.shape[:2]
        shorter = min(height, width)
        if max(height, width) > _LARGEST_ASPECT_RATIO * shorter:
            raise UserError(
                f"A picture of {width} x {height} pixels is too long and narrow to be classified: "
                "cut out a part of it."
            )
        target = int(_SHORTER_SIDE * self.image_size)
        resized_height, resized_width = (
            target if side == shorter else int(target * side / shorter) for side in (height, width)
        )
        resized = Image.fromarray(image).resize(
            (resized_width, resized_height), Image.Resampling.BICUBIC
        )
        top, left = (
            round((side - self.image_size) / 2) for side in (resized_height, resized_width)
        )
        square = (left, top, left + self.image_size, top + self.image_size)
        return np.asarray(resized.crop(square))
