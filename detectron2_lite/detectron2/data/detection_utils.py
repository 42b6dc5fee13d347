"""Reading images and transforming annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from PIL import Image

from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager

from . import transforms as T
from .catalog import MetadataCatalog

__all__ = [
    "SizeMismatchError",
    "annotations_to_instances",
    "check_image_size",
    "convert_image_to_rgb",
    "filter_empty_instances",
    "read_image",
    "transform_instance_annotations",
]

# ITU-R BT.601 in its analogue form: Y in [0, 1], columns of the second matrix are Y, U, V.
_RGB_TO_YUV = np.array(
    [[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]]
)
_YUV_TO_RGB = np.array([[1.0, 0.0, 1.13983], [1.0, -0.39465, -0.58060], [1.0, 2.03211, 0.0]])

_EXIF_ORIENTATION_TAG = 0x0112
_Transpose = Image.Transpose
# How to undo each value of the tag (EXIF 2.3, section 4.6.4 A).
_UPRIGHT = {
    2: _Transpose.FLIP_LEFT_RIGHT,
    3: _Transpose.ROTATE_180,
    4: _Transpose.FLIP_TOP_BOTTOM,
    5: _Transpose.TRANSPOSE,
    6: _Transpose.ROTATE_270,
    7: _Transpose.TRANSVERSE,
    8: _Transpose.ROTATE_90,
}


class SizeMismatchError(ValueError):
    """An image has another size than its annotation says."""


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION_TAG, 1)
    except Exception:  # Pillow raises errors of many classes on damaged EXIF data
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image and turn it upright as its EXIF orientation says.

    Args:
        file_name: path, or any address that ``PathManager`` knows.
        format: a Pillow mode such as RGB, or BGR, or YUV-BT.601, or None to keep the file's mode.

    Returns:
        uint8 (H, W, C), with C = 1 for L; (H, W) for a grey image read with None; float64 for
        YUV-BT.601.
    """
    with PathManager.open(file_name, "rb") as file:
        image = _upright(Image.open(file))
        if format is not None:
            image = image.convert("RGB" if format in ("BGR", "YUV-BT.601") else format)
        pixels = np.asarray(image)
    if format == "BGR":
        return pixels[:, :, ::-1]
    if format == "YUV-BT.601":
        return (pixels / 255.0) @ _RGB_TO_YUV.T
    return pixels[:, :, None] if format == "L" else pixels


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """RGB (H, W, 3) in 0 ... 255 from an image (H, W, C) that :func:`read_image` returned."""
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    if format == "BGR":
        return image[:, :, [2, 1, 0]]
    if format == "YUV-BT.601":
        return (image @ _YUV_TO_RGB.T) * 255.0
    if format == "L":
        return np.repeat(image[:, :, :1].astype(np.uint8), 3, axis=2)
    return np.asarray(Image.fromarray(image.astype(np.uint8), mode=format).convert("RGB"))


def check_image_size(dataset_dict: dict[str, Any], image: np.ndarray) -> None:
    """Compare an image with ``width`` and ``height`` of its entry; fill them in where missing.

    Raises:
        SizeMismatchError: they differ.
    """
    height, width = image.shape[:2]
    said = (dataset_dict.setdefault("width", width), dataset_dict.setdefault("height", height))
    if said != (width, height):
        name = dataset_dict.get("file_name", "an image")
        raise SizeMismatchError(
            f"{name} is {width} x {height} pixels, but its annotation says {said[0]} x {said[1]}; "
            "correct width and height in the annotation file"
        )


def transform_instance_annotations(
    annotation: dict[str, Any],
    transforms: T.Transform | Sequence[T.Transform],
    image_size: tuple[int, int],
) -> dict[str, Any]:
    """Apply transforms to one object.

    Args:
        annotation: with ``bbox`` and ``bbox_mode``, and optionally ``segmentation`` (polygons or
            a run-length encoded mask); it is modified.
        transforms: what was applied to the image.
        image_size: (height, width) after the transforms.

    Returns:
        ``annotation``. Its box is XYXY_ABS in float64, clipped to the image.

    Raises:
        NotImplementedError: it has keypoints.
        ValueError: a segmentation of another type.
    """
    if "keypoints" in annotation:
        raise NotImplementedError(
            "keypoints are not in detectron2_lite; remove them or install the real Detectron2"
        )
    if isinstance(transforms, (list, tuple)):
        transforms = T.TransformList(list(transforms))
    assert isinstance(transforms, T.Transform)
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    height, width = image_size
    moved = transforms.apply_box(np.array([box]))[0]
    annotation["bbox"] = np.minimum(moved.clip(min=0), [width, height, width, height])
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    if "segmentation" in annotation:
        annotation["segmentation"] = _transform_mask(
            annotation["segmentation"], transforms, image_size
        )
    return annotation


def _transform_mask(mask: Any, transforms: T.Transform, image_size: tuple[int, int]) -> Any:
    if isinstance(mask, list):
        polygons = transforms.apply_polygons([np.asarray(p).reshape(-1, 2) for p in mask])
        return [polygon.reshape(-1) for polygon in polygons]
    if isinstance(mask, dict):
        bitmap = transforms.apply_segmentation(mask_util.decode(mask))
        assert bitmap.shape[:2] == tuple(image_size), (bitmap.shape, image_size)
        return bitmap
    raise ValueError(f"a segmentation is a list of polygons or a COCO RLE dict, got {type(mask)}")


def annotations_to_instances(
    annos: Sequence[dict[str, Any]], image_size: tuple[int, int]
) -> Instances:
    """Objects of one image as Instances.

    Args:
        annos: T objects with ``bbox``, ``bbox_mode`` and ``category_id``.
        image_size: (height, width) of the image.

    Returns:
        Instances with ``gt_boxes`` (T boxes) and ``gt_classes`` (int64, (T,)).

    Raises:
        NotImplementedError: the objects have masks or keypoints.
    """
    if any("segmentation" in obj or "keypoints" in obj for obj in annos):
        raise NotImplementedError(
            "masks and keypoints are not in detectron2_lite; remove them from the annotations "
            "or install the real Detectron2"
        )
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    target = Instances(image_size)
    target.gt_boxes = Boxes(np.stack(boxes) if boxes else np.zeros((0, 4)))
    target.gt_classes = torch.tensor([int(a["category_id"]) for a in annos], dtype=torch.int64)
    return target


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
) -> Any:
    """Leave out objects without extent.

    Args:
        instances: with ``gt_boxes``.
        by_box: leave out boxes that are not wider and higher than ``box_threshold``.
        by_mask: leave out objects whose ``gt_masks``, if any, are empty.
        box_threshold: in pixels.
        return_mask: also return which objects were kept.

    Returns:
        The remaining Instances, and with ``return_mask`` a boolean tensor (objects,).
    """
    assert by_box or by_mask, "no criterion is chosen"
    criteria = [instances.gt_boxes.nonempty(threshold=box_threshold)] if by_box else []
    if by_mask and instances.has("gt_masks"):
        criteria.append(instances.gt_masks.nonempty())
    if not criteria:
        return instances
    keep = torch.stack(criteria).all(dim=0)
    return (instances[keep], keep) if return_mask else instances[keep]


def check_metadata_consistency(key: str, dataset_names: Sequence[str]) -> None:
    """ValueError where datasets that are used together differ in ``key`` of their metadata."""
    values = [getattr(MetadataCatalog.get(name), key) for name in dataset_names]
    for name, value in zip(dataset_names, values):
        if value != values[0]:
            raise ValueError(
                f"'{key}' of dataset '{name}' is {value}, but that of '{dataset_names[0]}' is "
                f"{values[0]}; datasets with different '{key}' cannot be joined"
            )
