"""Deterministic transforms of images and boxes besides those of fvcore."""

import numpy as np
import torch
from fvcore.transforms.transform import Transform
from PIL import Image
from PIL.Image import Resampling
from torch.nn import functional as F

BILINEAR: int = Resampling.BILINEAR.value


class ResizeTransform(Transform):
    """Resize images (h, w) or (h, w, C) to (new_h, new_w) with one of Pillow's filters.

    Pillow resizes uint8 images, with antialiasing; PyTorch resizes others, without.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None) -> None:
        super().__init__()
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w
        self.interp = BILINEAR if interp is None else interp

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        assert img.shape[:2] == (self.h, self.w), f"{img.shape} is not ({self.h}, {self.w}, ...)"
        resampling = Resampling(self.interp if interp is None else interp)
        if img.dtype == np.uint8:
            image = Image.fromarray(img[:, :, 0] if img.shape[2:] == (1,) else img)
            resized = np.asarray(image.resize((self.new_w, self.new_h), resampling))
            return resized.reshape(self.new_h, self.new_w, *img.shape[2:])
        mode = resampling.name.lower()
        corners = None if mode == "nearest" else False
        planes = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(img))).permute(2, 0, 1)[None]
        planes = F.interpolate(planes, (self.new_h, self.new_w), mode=mode, align_corners=corners)
        return planes[0].permute(1, 2, 0).reshape(self.new_h, self.new_w, *img.shape[2:]).numpy()

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        coords[:, 0] = coords[:, 0] * (self.new_w / self.w)
        coords[:, 1] = coords[:, 1] * (self.new_h / self.h)
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, interp=Resampling.NEAREST)

    def inverse(self) -> Transform:
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)
