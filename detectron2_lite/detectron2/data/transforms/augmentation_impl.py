"""Random augmentations of images and boxes.

They draw from NumPy's global generator, in a fixed order: equal seeds, equal results.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from fvcore.transforms import transform as fv
from fvcore.transforms.transform import NoOpTransform, Transform, TransformList

from .augmentation import Augmentation, _transform_to_aug
from .transform import BILINEAR, ResizeTransform


class RandomApply(Augmentation):
    """Another augmentation or transform, with probability ``prob``: one uniform number decides."""

    def __init__(self, tfm_or_aug: Transform | Augmentation, prob: float = 0.5) -> None:
        assert 0.0 <= prob <= 1.0, f"prob is a probability, not {prob}"
        self.aug, self.prob = _transform_to_aug(tfm_or_aug), prob

    def __call__(self, aug_input: Any) -> Transform:
        return self.aug(aug_input) if np.random.uniform() < self.prob else NoOpTransform()


class RandomFlip(Augmentation):
    """Flip horizontally, or else vertically, with probability ``prob``: one uniform number."""

    def __init__(
        self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False
    ) -> None:
        if horizontal == vertical:
            raise ValueError("RandomFlip needs exactly one of horizontal and vertical")
        self.prob, self.horizontal, self.vertical = prob, horizontal, vertical

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        return fv.HFlipTransform(width) if self.horizontal else fv.VFlipTransform(height)


class Resize(Augmentation):
    """Resize to a fixed ``shape``: (height, width), or one number for both."""

    def __init__(self, shape: int | Sequence[int], interp: int = BILINEAR) -> None:
        new_h, new_w = (shape, shape) if isinstance(shape, int) else shape
        self.shape, self.interp = (new_h, new_w), interp

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        return ResizeTransform(height, width, *self.shape, self.interp)


class ResizeShortestEdge(Augmentation):
    """Resize so that the shorter side gets a random length, and the longer at most ``max_size``.

    ``short_edge_length`` in pixels is one number, or (smallest, largest) with the ``sample_style``
    "range", or the values to choose from with "choice". 0 keeps the size.
    """

    def __init__(
        self,
        short_edge_length: int | Sequence[int],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = BILINEAR,
    ) -> None:
        assert sample_style in ("range", "choice"), sample_style
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length, short_edge_length)
        if sample_style == "range":
            assert len(short_edge_length) == 2, f"a range has two ends, got {short_edge_length}"
        self.short_edge_length, self.max_size = short_edge_length, max_size
        self.sample_style, self.interp = sample_style, interp

    def get_transform(self, image: np.ndarray) -> Transform:
        lengths = self.short_edge_length
        if self.sample_style == "range":
            size = np.random.randint(lengths[0], lengths[1] + 1)
        else:
            size = np.random.choice(lengths)
        if size == 0:
            return NoOpTransform()
        height, width = image.shape[:2]
        new_shape = self.get_output_shape(height, width, size, self.max_size)
        return ResizeTransform(height, width, *new_shape, self.interp)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """(height, width) after the resize, both rounded half up."""
        # In this order of operations: another rounding could change the size by a pixel.
        scale = short_edge_length * 1.0 / min(oldh, oldw)
        short, long = short_edge_length * 1.0, scale * max(oldh, oldw)
        if long > max_size:
            limit = max_size * 1.0 / long
            short, long = short * limit, long * limit
        height, width = (short, long) if oldh < oldw else (long, short)
        return int(height + 0.5), int(width + 0.5)


class ResizeScale(Augmentation):
    """Fit the image into a target size times a uniform random number ("large-scale jitter")."""

    def __init__(
        self, min_scale: float, max_scale: float, target_height: int, target_width: int
    ) -> None:
        self.min_scale, self.max_scale = min_scale, max_scale
        self.target_height, self.target_width = target_height, target_width

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        scale = np.random.uniform(self.min_scale, self.max_scale)
        target = np.multiply((self.target_height, self.target_width), scale)
        factor = np.minimum(target[0] / height, target[1] / width)
        new_h, new_w = np.round(np.multiply((height, width), factor)).astype(int).tolist()
        return ResizeTransform(height, width, new_h, new_w)


class RandomCrop(Augmentation):
    """Crop a random window: its size is drawn first, then the top, then the left.

    The two numbers of ``crop_size`` are, with ``crop_type`` "absolute", height and width in pixels,
    limited by the image; "relative": the same as fractions of the image; "relative_range": the
    smallest fractions, drawn up to 1; "absolute_range": the limits in pixels of both sides.
    """

    def __init__(self, crop_type: str, crop_size: Sequence[float]) -> None:
        assert crop_type in ("relative_range", "relative", "absolute", "absolute_range"), crop_type
        self.crop_type, self.crop_size = crop_type, crop_size

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        crop_height, crop_width = self.get_crop_size((height, width))
        top = np.random.randint(height - crop_height + 1)
        left = np.random.randint(width - crop_width + 1)
        return fv.CropTransform(left, top, crop_width, crop_height)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = image_size
        if self.crop_type.startswith("absolute"):
            first, second = (int(number) for number in self.crop_size)
            if self.crop_type == "absolute":
                return min(first, height), min(second, width)
            crop_height = np.random.randint(min(height, first), min(height, second) + 1)
            return crop_height, np.random.randint(min(width, first), min(width, second) + 1)
        high, wide = self.crop_size
        if self.crop_type == "relative_range":
            smallest = np.asarray(self.crop_size, dtype=np.float32)
            high, wide = smallest + np.random.rand(2) * (1 - smallest)
        return int(height * high + 0.5), int(width * wide + 0.5)


class FixedSizeCrop(Augmentation):
    """Crop a window of ``crop_size`` (height, width) and ``pad`` images that are smaller.

    One uniform number is drawn, the window's position in both directions.
    """

    def __init__(self, crop_size: Sequence[int], pad: bool = True, pad_value: float = 128) -> None:
        self.crop_size, self.pad, self.pad_value = crop_size, pad, pad_value

    def get_transform(self, image: np.ndarray) -> TransformList:
        size = image.shape[:2]
        slack = np.maximum(np.subtract(size, self.crop_size), 0)
        top, left = np.round(slack * np.random.uniform(0.0, 1.0)).astype(int)
        height, width = self.crop_size
        transforms = [fv.CropTransform(left, top, width, height, size[1], size[0])]
        if self.pad:
            bottom, right = np.maximum(np.subtract(self.crop_size, size), 0)
            kept = np.minimum(size, self.crop_size)
            sides = (0, 0, right, bottom, kept[1], kept[0])
            transforms.append(fv.PadTransform(*sides, self.pad_value, 255))
        return TransformList(transforms)


class RandomContrast(Augmentation):
    """``w * image + (1 - w) * mean`` with one uniform w in (intensity_min, intensity_max)."""

    def __init__(self, intensity_min: float, intensity_max: float) -> None:
        self.intensity_min, self.intensity_max = intensity_min, intensity_max

    def get_transform(self, image: np.ndarray) -> Transform:
        other = self._other(image)
        weight = np.random.uniform(self.intensity_min, self.intensity_max)
        return fv.BlendTransform(other, src_weight=1 - weight, dst_weight=weight)

    def _other(self, image: np.ndarray) -> Any:
        return image.mean()


class RandomBrightness(RandomContrast):
    """The same with black in place of the mean."""

    def _other(self, image: np.ndarray) -> Any:
        return 0


class RandomSaturation(RandomContrast):
    """The same with the grey version of an RGB image."""

    def _other(self, image: np.ndarray) -> Any:
        return image.dot([0.299, 0.587, 0.114])[:, :, np.newaxis]


class RandomLighting(Augmentation):
    """Shift an RGB image along the principal components of ImageNet's colours (AlexNet).

    Three normal numbers of standard deviation ``scale`` are drawn.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        vectors = "-0.5675 0.7192 0.4009 -0.5808 -0.0045 -0.8140 -0.5836 -0.6948 0.4203"
        self.eigen_vecs = np.array(vectors.split(), dtype=float).reshape(3, 3)
        self.eigen_vals = np.array([0.2175, 0.0188, 0.0045])

    def get_transform(self, image: np.ndarray) -> Transform:
        weights = np.random.normal(scale=self.scale, size=3)
        shift = self.eigen_vecs.dot(weights * self.eigen_vals)
        return fv.BlendTransform(shift, src_weight=1.0, dst_weight=1.0)
