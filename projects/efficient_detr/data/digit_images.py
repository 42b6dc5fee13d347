"""Small detection pictures composed from real handwritten digits: how one picture is drawn.

The digits are the 1,797 scans of 8x8 pixels that scikit-learn carries in its wheel. A picture is a
background (smooth colour noise or a muted crop of one of scikit-learn's two photographs), clutter
(lines, ellipses, rectangles) and 0 to 6 digits, each enlarged smoothly, rotated, sheared, stretched
and painted in a colour that stands out from what lies behind it. Digits are never mirrored: that
would change their class.

All sizes are in pixels, all pictures are RGB uint8 arrays of shape (height, width, 3), and every
random choice comes from the `numpy.random.Generator` that the caller passes in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["DigitPictureSettings", "GlyphSource", "PlacedDigit", "draw_digit_picture"]

Image = NDArray[np.uint8]  # (height, width, 3), RGB
Mask = NDArray[np.float32]  # (height, width), 0 = background, 1 = ink

# One scanned pixel becomes this many pixels of the smooth master, from which a glyph is warped.
_ENLARGEMENT = 10
# A margin around the scan, in scanned pixels, so that the ink fades out inside the master.
_MARGIN = 1
# Ink below the first value is transparent, above the second opaque, half-way on the box's edge.
# The wide ramp keeps the small holes of 4, 6, 8 and 9 visible, which 8x8 pixels hardly resolve.
_INK_EDGE = (0.26, 0.66)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class DigitPictureSettings:
    """What the pictures look like.

    Attributes:
        image_side: smallest and largest height and width of a picture, drawn independently.
        digit_side: smallest and largest height and width of a digit's box.
        max_digits: largest number of digits in a picture.
        empty_share: share of the pictures that hold no digit, 0 to 1.
        max_rotation: largest rotation to either side, degrees; small enough to tell 6 from 9.
        max_shear: largest horizontal shear to either side, as a tangent.
        max_overlap: largest intersection over union of two digits' boxes.
        overlap_share: share of the digits that may overlap digits painted before them, 0 to 1.
        max_clutter: largest number of clutter shapes.
        photo_share: share of the pictures whose background is a photograph, 0 to 1.
        contrast: smallest and largest difference in brightness (0 to 255) by which a digit is
            brighter than what lies behind it.
    """

    image_side: tuple[int, int] = (96, 112)
    digit_side: tuple[int, int] = (16, 80)
    max_digits: int = 6
    empty_share: float = 0.04
    max_rotation: float = 15.0
    max_shear: float = 0.2
    max_overlap: float = 0.12
    overlap_share: float = 0.15
    max_clutter: int = 3
    photo_share: float = 0.4
    contrast: tuple[int, int] = (80, 160)

    def __post_init__(self) -> None:
        for name in ("image_side", "digit_side", "contrast"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be (smallest, largest) with 0 < smallest <= largest, "
                    f"got {(low, high)}."
                )
        if self.digit_side[1] + 4 > self.image_side[0]:
            raise ValueError(
                f"digit_side {self.digit_side} does not fit into image_side {self.image_side}: "
                "leave at least 4 pixels between the largest digit and the smallest image."
            )


@dataclass(frozen=True)
class PlacedDigit:
    """A digit in a picture.

    Attributes:
        value: 0 to 9.
        scan_index: the scan it was drawn from.
        box: tight box (left, top, width, height) of its ink.
    """

    value: int
    scan_index: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class _Glyph:
    """A warped digit: its mask and the tight box (left, top, width, height) of the ink in it."""

    mask: Mask
    box: tuple[int, int, int, int]


class GlyphSource:
    """Scanned digits, warped to any size through an enlarged, smooth master.

    Args:
        scans: scanned digits, shape (N, 8, 8), ink from 0 to 16.
        values: the digit that each scan shows, shape (N,), 0 to 9.
        indices: which scans may be used.
    """

    def __init__(
        self, *, scans: NDArray[np.floating], values: NDArray[np.integer], indices: Sequence[int]
    ) -> None:
        if len(indices) == 0:
            raise ValueError(
                "A glyph source needs at least one digit scan, got an empty list of indices."
            )
        self.indices = [int(index) for index in indices]
        self.values = {index: int(values[index]) for index in self.indices}
        self._scans = scans
        self._masters: dict[int, tuple[Mask, NDArray[np.float64]]] = {}

    def pick(self, generator: np.random.Generator) -> int:
        """Return the index of a random scan."""
        return self.indices[generator.integers(len(self.indices))]

    def render(
        self,
        index: int,
        *,
        longer_side: float,
        shape: NDArray[np.floating],
        digit_side: tuple[int, int],
    ) -> _Glyph | None:
        """Warp a scan to its final resolution.

        Args:
            index: which scan.
            longer_side: wanted longer side of the box; raised where the shorter side would fall
                below the smallest permitted side.
            shape: linear map (2, 2) from master to picture directions; its scale is ignored.
            digit_side: smallest and largest permitted side of the box.

        Returns:
            The glyph, or None when the sides of its box cannot both be within `digit_side`.
        """
        master, outline = self._master(index)
        outline = outline @ shape.T
        width, height = np.ptp(outline, axis=0)
        scale = max(longer_side / max(width, height), (digit_side[0] + 1) / min(width, height))
        # Two pixels on each side for the soft edges of the ink.
        canvas = (math.ceil(width * scale) + 4, math.ceil(height * scale) + 4)
        matrix = np.column_stack([shape * scale, 2 - outline.min(axis=0) * scale])
        warped = cv2.warpAffine(master, matrix, canvas, flags=cv2.INTER_LINEAR)
        low, high = _INK_EDGE
        mask = np.clip((warped - low) / (high - low), 0, 1).astype(np.float32)
        box = _tight_box(mask)
        within = digit_side[0] <= min(box[2:]) and max(box[2:]) <= digit_side[1]
        return _Glyph(mask, box) if within else None

    def _master(self, index: int) -> tuple[Mask, NDArray[np.float64]]:
        """Return the master of a scan and its outline, made at first use."""
        if index not in self._masters:
            master = _enlarge(self._scans[index])
            self._masters[index] = master, _outline(master)
        return self._masters[index]


def _enlarge(scan: NDArray[np.floating]) -> Mask:
    """Enlarge an (8, 8) scan to a smooth master with ink from 0 to 1."""
    padded = np.pad(scan.astype(np.float32) / 16, _MARGIN)
    side = padded.shape[0] * _ENLARGEMENT
    smooth = cv2.resize(padded, (side, side), interpolation=cv2.INTER_CUBIC)
    return cv2.GaussianBlur(smooth, (0, 0), 0.25 * _ENLARGEMENT).astype(np.float32)


def _outline(master: Mask) -> NDArray[np.float64]:
    """Return the (x, y) corners of the convex hull of a master's ink, shape (N, 2)."""
    rows, columns = np.nonzero(master >= sum(_INK_EDGE) / 2)
    points = np.stack([columns, rows], axis=1).astype(np.int32)
    return cv2.convexHull(points).reshape(-1, 2).astype(np.float64)


def _tight_box(mask: Mask) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of the pixels that are at least half covered with ink."""
    columns = np.flatnonzero((mask >= 0.5).any(axis=0))
    rows = np.flatnonzero((mask >= 0.5).any(axis=1))
    if len(columns) == 0:
        return 0, 0, 0, 0
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1


def draw_digit_picture(
    generator: np.random.Generator,
    glyphs: GlyphSource,
    photos: Sequence[Image],
    settings: DigitPictureSettings,
) -> tuple[Image, list[PlacedDigit]]:
    """Draw one picture.

    Args:
        generator: source of every random choice; equal states give equal pictures.
        glyphs: the digits that may appear.
        photos: photographs for backgrounds, each larger than the pictures; may be empty.
        settings: what the picture looks like.

    Returns:
        The picture, RGB uint8 (height, width, 3), and its digits in the order of painting.
    """
    low, high = settings.image_side
    height, width = (int(side) for side in generator.integers(low, high + 1, size=2))
    use_photo = len(photos) > 0 and generator.random() < settings.photo_share
    if use_photo:
        canvas = _photo_background(
            generator, photos[int(generator.integers(len(photos)))], height, width
        )
    else:
        canvas = _noise_background(generator, height, width)
    for _ in range(generator.integers(settings.max_clutter + 1)):
        canvas = _add_clutter(generator, canvas)
    placed: list[PlacedDigit] = []
    for longer_side in _draw_sizes(generator, settings, height * width):
        _add_digit(generator, canvas, placed, glyphs, longer_side, settings)
    canvas += generator.uniform(0, 5) * generator.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), placed


def _draw_sizes(
    generator: np.random.Generator, settings: DigitPictureSettings, area: int
) -> list[float]:
    """Return the wanted longer sides of the digits, largest first: the more, the smaller."""
    if settings.max_digits == 0 or generator.random() < settings.empty_share:
        return []
    count = int(generator.integers(1, settings.max_digits + 1))
    low, high = 1.9 * settings.digit_side[0], 0.97 * settings.digit_side[1]
    high = max(low, min(high, 1.05 * math.sqrt(area / count)))
    return sorted(generator.uniform(low, high, size=count).tolist(), reverse=True)


def _noise_background(generator: np.random.Generator, height: int, width: int) -> Mask:
    """Return smooth colour noise: a coarse grid of similar random colours, interpolated."""
    rows, columns = generator.integers(2, 6, size=2)
    grey = generator.uniform(20, 110)
    base = grey + generator.uniform(0.3, 0.8) * (
        generator.uniform(0, 160, size=3) - grey
    )  # rarely garish
    grid = base + generator.uniform(8, 30) * generator.standard_normal((rows, columns, 3))
    smooth = cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth, 0, 255).astype(np.float32)


def _photo_background(
    generator: np.random.Generator, photo: Image, height: int, width: int
) -> Mask:
    """Return a random crop of a photograph, muted and darkened so that digits stay legible."""
    zoom = generator.uniform(1.0, min(photo.shape[0] / height, photo.shape[1] / width))
    crop_height, crop_width = int(height * zoom), int(width * zoom)
    top = generator.integers(photo.shape[0] - crop_height + 1)
    left = generator.integers(photo.shape[1] - crop_width + 1)
    window = photo[top : top + crop_height, left : left + crop_width].astype(np.float32)
    crop = cv2.resize(window, (width, height), interpolation=cv2.INTER_AREA)
    mean = crop.mean(axis=(0, 1))
    faded = mean + generator.uniform(0.35, 0.7) * (crop - mean)
    darkened = faded * (generator.uniform(40, 110) / max(float(mean.mean()), 1.0))
    return np.clip(darkened, 0, 255).astype(np.float32)


def _add_clutter(generator: np.random.Generator, canvas: Mask) -> Mask:
    """Return the canvas with one translucent line, ellipse or rectangle."""
    height, width = canvas.shape[:2]
    colour = [float(value) for value in generator.uniform(0, 200, size=3)]
    points = generator.uniform([0, 0], [width, height], size=(2, 2)).astype(int)
    first, second = [tuple(int(value) for value in point) for point in points]
    thickness = int(generator.integers(1, 4))
    kind = generator.integers(3)
    shape = np.clip(canvas, 0, 255).astype(np.uint8)
    if kind == 0:
        cv2.line(shape, first, second, colour, thickness, cv2.LINE_AA)
    else:
        thickness = -1 if generator.random() < 0.5 else thickness
        half = tuple(int(value) for value in generator.integers(5, 36, size=2))
        if kind == 1:
            cv2.ellipse(
                shape,
                first,
                half,
                float(generator.uniform(0, 180)),
                0,
                360,
                colour,
                thickness,
                cv2.LINE_AA,
            )
        else:
            corner = (first[0] + half[0], first[1] + half[1])
            cv2.rectangle(shape, first, corner, colour, thickness, cv2.LINE_AA)
    opacity = np.float32(generator.uniform(0.2, 0.6))
    return canvas + opacity * (shape.astype(np.float32) - canvas)


def _add_digit(
    generator: np.random.Generator,
    canvas: Mask,
    placed: list[PlacedDigit],
    glyphs: GlyphSource,
    longer_side: float,
    settings: DigitPictureSettings,
) -> None:
    """Paint one digit and append it to `placed`; a full picture stays as it is."""
    for _ in range(4):
        index = glyphs.pick(generator)
        shape = _random_shape(generator, settings)
        glyph = glyphs.render(
            index, longer_side=longer_side, shape=shape, digit_side=settings.digit_side
        )
        place = None if glyph is None else _free_place(generator, canvas, placed, glyph, settings)
        if glyph is not None and place is not None:
            left, top = place
            _paint(generator, canvas, glyph, left, top, settings)
            box = (left + glyph.box[0], top + glyph.box[1], glyph.box[2], glyph.box[3])
            placed.append(PlacedDigit(glyphs.values[index], index, box))
            return


def _free_place(
    generator: np.random.Generator,
    canvas: Mask,
    placed: Sequence[PlacedDigit],
    glyph: _Glyph,
    settings: DigitPictureSettings,
) -> tuple[int, int] | None:
    """Return (left, top) where a glyph overlaps the placed digits little enough, or None."""
    room_y = canvas.shape[0] - glyph.mask.shape[0]
    room_x = canvas.shape[1] - glyph.mask.shape[1]
    if min(room_x, room_y) < 0:
        return None
    permitted = settings.max_overlap if generator.random() < settings.overlap_share else 0.0
    for left, top in generator.integers([room_x + 1, room_y + 1], size=(10, 2)).tolist():
        box = (left + glyph.box[0], top + glyph.box[1], glyph.box[2], glyph.box[3])
        if all(_overlap(box, other.box) <= permitted for other in placed):
            return left, top
    return None


def _random_shape(
    generator: np.random.Generator, settings: DigitPictureSettings
) -> NDArray[np.float64]:
    """Return a random rotation, shear and stretch as one linear map of shape (2, 2)."""
    angle = math.radians(generator.uniform(-settings.max_rotation, settings.max_rotation))
    shear = generator.uniform(-settings.max_shear, settings.max_shear)
    stretch = generator.uniform(0.85, 1.15)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return rotation @ np.array([[stretch, shear], [0.0, 1.0 / stretch]])


def _paint(
    generator: np.random.Generator,
    canvas: Mask,
    glyph: _Glyph,
    left: int,
    top: int,
    settings: DigitPictureSettings,
) -> None:
    """Blend a glyph into the canvas, in place."""
    height, width = glyph.mask.shape
    region = canvas[top : top + height, left : left + width]
    colour = _contrasting_colour(generator, region, settings.contrast)
    region += glyph.mask[..., None] * (colour - region)


def _contrasting_colour(
    generator: np.random.Generator, region: Mask, contrast: tuple[int, int]
) -> NDArray[np.float32]:
    """Return a random RGB colour that is brighter than a region by some contrast."""
    luma = region @ _LUMA
    brightness = float(luma.mean())
    wanted = generator.uniform(*contrast) + float(luma.std())
    target = min(brightness + wanted, 255.0)
    colour = generator.uniform(0, 255, size=3).astype(np.float32)
    for _ in range(4):  # clipping shifts the brightness, so the shift is repeated
        colour = np.clip(colour + np.float32(target - colour @ _LUMA), 0, 255)
    return colour


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> float:
    """Return the intersection over union of two boxes (left, top, width, height)."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    intersection = max(width, 0) * max(height, 0)
    return intersection / (first[2] * first[3] + second[2] * second[3] - intersection)
