"""Reading images and transforming annotations."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

from . import transforms as T


class SizeMismatchError(ValueError):
    """An image has another size than its annotation says."""


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image (H, W, C) and turn it upright as its EXIF orientation says.

    ``format`` is a Pillow mode such as RGB, or BGR, or None to keep the file's mode.
    """
    with PathManager.open(file_name, "rb") as file:
        image: Image.Image = Image.open(file)
        with contextlib.suppress(Exception):  # damaged EXIF data raise errors of many classes
            ImageOps.exif_transpose(image, in_place=True)
        if format is not None:
            image = image.convert("RGB" if format == "BGR" else format)
        pixels = np.asarray(image)
    if format == "BGR":
        return pixels[:, :, ::-1]
    return pixels[:, :, None] if format == "L" else pixels


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """RGB (H, W, 3) from an image (H, W, C) in the ``format`` RGB, BGR or L."""
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    if format == "L":
        return np.repeat(image, 3, axis=2)
    return image[:, :, ::-1] if format == "BGR" else image


def check_image_size(dataset_dict: dict[str, Any], image: np.ndarray) -> None:
    """SizeMismatchError unless ``width`` and ``height``, set where missing, are the image's."""
    height, width = image.shape[:2]
    said = (dataset_dict.setdefault("width", width), dataset_dict.setdefault("height", height))
    if said != (width, height):
        name = dataset_dict.get("file_name", "an image")
        raise SizeMismatchError(f"{name} is {width} x {height} pixels, its annotation says {said}")


def transform_instance_annotations(
    annotation: dict[str, Any], transforms: T.Transform, image_size: tuple[int, int]
) -> dict[str, Any]:
    """Apply the transforms of an image to one of its objects, in place.

    The box becomes XYXY_ABS, clipped to ``image_size`` (height, width) after them.
    """
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
    annos: Sequence[dict[str, Any]], image_size: tuple[int, int]
) -> Instances:
    """``gt_boxes`` and ``gt_classes`` (int64) of the objects of an image (height, width)."""
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    classes = torch.tensor([int(obj["category_id"]) for obj in annos], dtype=torch.int64)
    gt_boxes = Boxes(np.stack(boxes) if boxes else np.zeros((0, 4)))
    return Instances(image_size, gt_boxes=gt_boxes, gt_classes=classes)


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = False,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
) -> Any:
    """Objects with boxes above the threshold; ``return_mask`` adds which, boolean (objects,)."""
    assert by_box and not by_mask, "only boxes can be filtered in detectron2_lite"
    keep = instances.gt_boxes.nonempty(threshold=box_threshold)
    return (instances[keep], keep) if return_mask else instances[keep]
