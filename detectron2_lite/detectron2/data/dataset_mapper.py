"""From an entry of a dataset to the input of a model."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import detection_utils as utils
from . import transforms as T


class DatasetMapper:
    """Reads and augments an entry's ``image`` (uint8 (3, H, W)); boxes become ``instances``."""

    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
    ) -> None:
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        mode = "training" if is_train else "inference"
        logging.getLogger(__name__).info("Augmentations in %s: %s", mode, augmentations)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        entry = copy.deepcopy(dataset_dict)
        image = utils.read_image(entry["file_name"], format=self.image_format)
        utils.check_image_size(entry, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image, size = aug_input.image, aug_input.image.shape[:2]
        entry["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        annotations = entry.pop("annotations", None)
        if self.is_train and annotations is not None:
            objects = [obj for obj in annotations if not obj.get("iscrowd", 0)]
            for obj in objects:
                obj.pop("segmentation", None)
                utils.transform_instance_annotations(obj, transforms, size)
            instances = utils.annotations_to_instances(objects, size)
            entry["instances"] = utils.filter_empty_instances(instances)
        return entry
