"""From a Detectron2 dataset record to a model input, with the augmentations of DETR."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, Instances

from efficient_detr.errors import UserError


class DetrDatasetMapper:
    """Reads the image of a record, augments it and turns its boxes into ``Instances``.

    DETR's training augmentation chooses one of two pipelines with probability 1/2 each: a plain
    resize, or resize - random crop - resize, so that small objects are also seen enlarged (DETR,
    arXiv 2005.12872, section 4 "Technical details"). All random numbers come from NumPy's global
    generator.

    Crowd regions and degenerate boxes (no area, outside of the crop, not finite) are dropped:
    a box without area has no generalized IoU and would only add NaN to the loss.

    Args:
        augmentations: Detectron2 augmentations, applied in order.
        crop_augmentations: the second pipeline of training, or None for always the first one.
        is_train: whether annotations are kept; the crop pipeline is used in training only.
        image_format: channel order of the image, ``"RGB"`` or ``"BGR"``.

    Raises:
        ValueError: for an unknown ``image_format``.
    """

    def __init__(
        self,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        crop_augmentations: Sequence[T.Augmentation | T.Transform] | None = None,
        is_train: bool,
        image_format: str = "RGB",
    ) -> None:
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', not {image_format!r}")
        self.augmentations = T.AugmentationList(list(augmentations))
        self.crop_augmentations = (
            None if crop_augmentations is None else T.AugmentationList(list(crop_augmentations))
        )
        self.is_train = is_train
        self.image_format = image_format

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one record.

        Args:
            dataset_dict: a record of Detectron2's dataset format with ``file_name``,
                ``image_id``, ``height``, ``width`` and, for training, ``annotations``.

        Returns:
            A new dict with the record's entries except ``annotations``, plus ``image``, a uint8
            tensor (3, H, W) with values 0..255, and in training ``instances`` with ``gt_boxes``
            (T, 4) in absolute (x1, y1, x2, y2) of the augmented image and ``gt_classes`` (T,).

        Raises:
            UserError: if the image cannot be read, has not the size that the record gives, or an
                annotation has no usable box or class.
        """
        record = copy.deepcopy(dataset_dict)
        annotations = record.pop("annotations", None)
        image = T.AugInput(self._read_image(record))
        transforms = self._choose_pipeline()(image)
        record["image"] = torch.from_numpy(np.ascontiguousarray(image.image.transpose(2, 0, 1)))
        if self.is_train and annotations is not None:
            size: tuple[int, int] = image.image.shape[:2]
            record["instances"] = self._to_instances(record, annotations, transforms, size)
        return record

    def _choose_pipeline(self) -> T.AugmentationList:
        if self.is_train and self.crop_augmentations is not None and np.random.rand() < 0.5:
            return self.crop_augmentations
        return self.augmentations

    def _read_image(self, record: dict[str, Any]) -> np.ndarray:
        """The picture as uint8 (H, W, 3)."""
        try:
            image = detection_utils.read_image(record["file_name"], format=self.image_format)
            detection_utils.check_image_size(record, image)
        except detection_utils.SizeMismatchError as error:
            raise UserError(
                f"Image {record.get('image_id')} ({record['file_name']}) is "
                f"{image.shape[1]}x{image.shape[0]} pixels, but its annotation says "
                f"{record['width']}x{record['height']}: correct the annotation file."
            ) from error
        # Pillow raises OSError, SyntaxError or ValueError, depending on where a file is broken.
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(
                f"Image {record.get('image_id')}: {record['file_name']} cannot be read "
                f"({_one_line(error)}): restore the file or remove it from the annotations."
            ) from error
        return image

    def _to_instances(
        self,
        record: dict[str, Any],
        annotations: list[dict[str, Any]],
        transforms: T.TransformList,
        size: tuple[int, int],
    ) -> Instances:
        """Boxes and classes after the transforms; ``size`` is (H, W) of the augmented image."""
        try:
            kept = [
                detection_utils.transform_instance_annotations(_box_only(a), transforms, size)
                for a in annotations
                if a.get("iscrowd", 0) == 0
            ]
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise UserError(
                f"Image {record.get('image_id')} ({record['file_name']}) has an annotation without "
                f"a valid box or category ({_one_line(error)}): correct the annotation file."
            ) from error
        finite = [a for a in kept if np.isfinite(a["bbox"]).all()]
        instances = detection_utils.annotations_to_instances(finite, size)
        return detection_utils.filter_empty_instances(instances, by_box=True, by_mask=False)


def _box_only(annotation: dict[str, Any]) -> dict[str, Any]:
    """Without masks and key points, which a box detector would only carry through each crop."""
    if len(annotation["bbox"]) != 4:
        raise ValueError(f"bbox {annotation['bbox']} has not four numbers")
    return {
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode(annotation["bbox_mode"]),
        "category_id": annotation["category_id"],
    }


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
