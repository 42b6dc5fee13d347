"""Transforms beyond those of fvcore."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fvcore.transforms.transform import NoOpTransform, Transform
from PIL import Image
from PIL.Image import Resampling
from torch.nn import functional as F

BILINEAR: int = Resampling.BILINEAR.value
_INTERPOLATE_MODES = {
    Resampling.NEAREST: "nearest",
    Resampling.BILINEAR: "bilinear",
    Resampling.BICUBIC: "bicubic",
}


class ResizeTransform(Transform):
    """Resize from (h, w) to (new_h, new_w) pixels with one of Pillow's filters."""

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None) -> None:
        super().__init__()
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w
        self.interp = BILINEAR if interp is None else interp

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image of 2 to 4 dimensions (h, w, ...).

        Pillow resizes uint8 images, with antialiasing; PyTorch resizes others, without.
        """
        assert img.shape[:2] == (self.h, self.w), f"{img.shape} is not ({self.h}, {self.w}, ...)"
        assert img.ndim <= 4
        resampling = Resampling(self.interp if interp is None else interp)
        if img.dtype == np.uint8:
            single_channel = img.ndim > 2 and img.shape[2] == 1
            image = Image.fromarray(img[:, :, 0] if single_channel else img)
            resized = np.asarray(image.resize((self.new_w, self.new_h), resampling))
            return resized[:, :, None] if single_channel else resized
        mode = _INTERPOLATE_MODES[resampling]
        corners = None if mode == "nearest" else False
        size = (self.new_h, self.new_w)
        planes = torch.from_numpy(np.ascontiguousarray(img)).reshape(1, self.h, self.w, -1)
        planes = planes.permute(0, 3, 1, 2)
        planes = F.interpolate(planes, size, mode=mode, align_corners=corners)
        return planes[0].permute(1, 2, 0).reshape(*size, *img.shape[2:]).numpy()

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        coords[:, 0] = coords[:, 0] * (self.new_w / self.w)
        coords[:, 1] = coords[:, 1] * (self.new_h / self.h)
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, interp=Resampling.NEAREST)

    def inverse(self) -> Transform:
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)


class ColorTransform(Transform):
    """A function ``op`` of the image array; points and labels stay as they are."""

    def __init__(self, op: Callable[[Any], Any]) -> None:
        if not callable(op):
            raise ValueError(f"a colour transform needs a function of the image, got {op!r}")
        super().__init__()
        self.op = op

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self.op(img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def inverse(self) -> Transform:
        return NoOpTransform()


class PILColorTransform(ColorTransform):
    """The same with a function of a Pillow image, e.g. one of ``ImageOps``."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return np.asarray(self.op(Image.fromarray(img)))
