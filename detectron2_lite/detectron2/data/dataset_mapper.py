"""From an entry of a dataset to the input of a model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import detection_utils as utils
from . import transforms as T

__all__ = ["DatasetMapper"]


class DatasetMapper:
    """Reads the image of an entry, augments it, and turns its annotations into Instances."""

    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        use_instance_mask: bool = False,
        use_keypoint: bool = False,
        instance_mask_format: str = "polygon",
        recompute_boxes: bool = False,
    ) -> None:
        """Set up the mapping.

        Args:
            is_train: whether annotations are kept.
            augmentations: applied in order.
            image_format: see :func:`~detectron2.data.detection_utils.read_image`.
            use_instance_mask: must be False here, as masks are left out.
            use_keypoint: must be False here.
            instance_mask_format: has no effect without masks.
            recompute_boxes: must be False here.

        Raises:
            NotImplementedError: masks or keypoints are asked for.
        """
        if use_instance_mask or use_keypoint or recompute_boxes:
            raise NotImplementedError(
                "masks and keypoints are not in detectron2_lite; install the real Detectron2"
            )
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        mode = "training" if is_train else "inference"
        logging.getLogger(__name__).info("Augmentations in %s: %s", mode, augmentations)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one entry.

        Args:
            dataset_dict: a dictionary with ``file_name`` and in training ``annotations``; it is
                not modified.

        Returns:
            A copy with ``image``, a uint8 tensor (3, H, W), and in training ``instances`` with
            ``gt_boxes`` and ``gt_classes`` in place of ``annotations``: without crowds and
            without objects that the augmentation left empty.
        """
        entry = copy.deepcopy(dataset_dict)
        image = utils.read_image(entry["file_name"], format=self.image_format)
        utils.check_image_size(entry, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        size = aug_input.image.shape[:2]
        channels_first = aug_input.image.transpose(2, 0, 1)
        entry["image"] = torch.as_tensor(np.ascontiguousarray(channels_first))
        annotations = entry.pop("annotations", None)
        if self.is_train and annotations is not None:
            entry["instances"] = self._instances(annotations, transforms, size)
        return entry

    @staticmethod
    def _instances(annotations: list[dict[str, Any]], transforms: T.TransformList, size: Any) -> Any:
        kept = []
        for obj in annotations:
            if not obj.get("iscrowd", 0):
                obj.pop("segmentation", None)
                obj.pop("keypoints", None)
                kept.append(utils.transform_instance_annotations(obj, transforms, size))
        return utils.filter_empty_instances(utils.annotations_to_instances(kept, size))
