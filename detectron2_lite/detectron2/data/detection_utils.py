"""Reading images and transforming annotations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2._absent import absence_message
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image

from . import transforms as T
from .catalog import MetadataCatalog

# How to undo each value of EXIF's orientation tag (EXIF 2.3, section 4.6.4 A).
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class SizeMismatchError(ValueError):
    """An image has another size than its annotation says."""


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image and turn it upright as its EXIF orientation says.

    ``format`` is a Pillow mode such as RGB, or BGR, or None to keep the file's mode. The result is
    uint8 (H, W, C), with C = 1 for L; (H, W) for a grey image that is read with None.
    """
    with PathManager.open(file_name, "rb") as file:
        image: Image.Image = Image.open(file)
        try:
            orientation = image.getexif().get(_ORIENTATION_TAG)
        except Exception:  # Pillow raises errors of many classes on damaged EXIF data
            orientation = None
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        if format is not None:
            image = image.convert("RGB" if format == "BGR" else format)
        pixels = np.asarray(image)
    if format == "BGR":
        return pixels[:, :, ::-1]
    return pixels[:, :, None] if format == "L" else pixels


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """RGB (H, W, 3) in 0 ... 255 from an image (H, W, C) that :func:`read_image` returned."""
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    if format == "BGR":
        return image[:, :, [2, 1, 0]]
    image = image.astype(np.uint8)
    return np.asarray(Image.fromarray(image[:, :, 0] if format == "L" else image).convert("RGB"))


def check_image_size(dataset_dict: dict[str, Any], image: np.ndarray) -> None:
    """Compare an image with ``width`` and ``height`` of its entry; fill them in where missing.

    A difference raises :class:`SizeMismatchError`.
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
    *,
    keypoint_hflip_indices: Any = None,
) -> dict[str, Any]:
    """Apply the transforms of an image to one of its objects, in place.

    ``image_size`` is (height, width) after the transforms. The box becomes XYXY_ABS in float64,
    clipped to the image; polygons in ``segmentation`` are transformed. Other segmentations and
    keypoints raise NotImplementedError.
    """
    if "keypoints" in annotation or isinstance(annotation.get("segmentation"), dict):
        raise NotImplementedError(absence_message("transforming bitmaps and keypoints"))
    if isinstance(transforms, Sequence):
        transforms = T.TransformList(list(transforms))
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    height, width = image_size
    moved = transforms.apply_box(np.array([box]))[0]
    annotation["bbox"] = np.minimum(moved.clip(min=0), [width, height, width, height])
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    if "segmentation" in annotation:
        polygons = [np.asarray(points).reshape(-1, 2) for points in annotation["segmentation"]]
        polygons = transforms.apply_polygons(polygons)
        annotation["segmentation"] = [points.reshape(-1) for points in polygons]
    return annotation


def annotations_to_instances(
    annos: Sequence[dict[str, Any]], image_size: tuple[int, int], mask_format: str = "polygon"
) -> Instances:
    """T objects of an image (height, width) as Instances: ``gt_boxes``, ``gt_classes`` (int64).

    Objects with masks or keypoints raise NotImplementedError.
    """
    if any("segmentation" in obj or "keypoints" in obj for obj in annos):
        raise NotImplementedError(absence_message("gt_masks (remove 'segmentation') or keypoints"))
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    classes = torch.tensor([int(obj["category_id"]) for obj in annos], dtype=torch.int64)
    gt_boxes = Boxes(np.stack(boxes) if boxes else np.zeros((0, 4)))
    return Instances(image_size, gt_boxes=gt_boxes, gt_classes=classes)


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
) -> Any:
    """Leave out objects whose ``gt_boxes`` are not wider and higher than the threshold (pixels).

    ``by_mask`` does the same with ``gt_masks`` where there are any. ``return_mask`` also returns
    which objects were kept, boolean (objects,).
    """
    assert by_box or by_mask, "no criterion is chosen"
    keep = torch.ones(len(instances), dtype=torch.bool)
    if by_box:
        keep = instances.gt_boxes.nonempty(threshold=box_threshold)
    if by_mask and instances.has("gt_masks"):
        keep = keep & instances.gt_masks.nonempty()
    return (instances[keep], keep) if return_mask else instances[keep]


def check_metadata_consistency(key: str, dataset_names: Sequence[str]) -> None:
    """ValueError where datasets that are used together differ in ``key`` of their metadata."""
    values = [getattr(MetadataCatalog.get(name), key) for name in dataset_names]
    for name, value in zip(dataset_names, values, strict=True):
        if value != values[0]:
            raise ValueError(
                f"'{key}' of dataset '{name}' is {value}, but that of '{dataset_names[0]}' is "
                f"{values[0]}; datasets with different '{key}' cannot be joined"
            )
