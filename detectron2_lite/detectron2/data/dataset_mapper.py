"""From an entry of a dataset to the input of a model."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2._absent import absence_message

from . import detection_utils as utils
from . import transforms as T


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
        keypoint_hflip_indices: Any = None,
        precomputed_proposal_topk: int | None = None,
        recompute_boxes: bool = False,
    ) -> None:
        """Set up the mapping; annotations are kept only if ``is_train``.

        ``image_format``: see ``detection_utils.read_image``. The arguments for masks, keypoints
        and proposals must keep their defaults here: NotImplementedError.
        """
        if use_instance_mask or use_keypoint or recompute_boxes or precomputed_proposal_topk:
            raise NotImplementedError(absence_message("mapping of masks, keypoints, proposals"))
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        mode = "training" if is_train else "inference"
        logging.getLogger(__name__).info("Augmentations in %s: %s", mode, augmentations)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """A changed copy of an entry, which has ``file_name`` and in training ``annotations``.

        ``image`` is a uint8 tensor (3, H, W). In training, ``instances`` with ``gt_boxes`` and
        ``gt_classes`` replace ``annotations``, without crowds and without empty boxes.
        """
        entry = copy.deepcopy(dataset_dict)
        image = utils.read_image(entry["file_name"], format=self.image_format)
        utils.check_image_size(entry, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        entry["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        annotations = entry.pop("annotations", None)
        if self.is_train and annotations is not None:
            size = image.shape[:2]
            moved = []
            for obj in annotations:
                if not obj.get("iscrowd", 0):
                    obj = {k: v for k, v in obj.items() if k not in ("segmentation", "keypoints")}
                    moved.append(utils.transform_instance_annotations(obj, transforms, size))
            instances = utils.annotations_to_instances(moved, size)
            entry["instances"] = utils.filter_empty_instances(instances)
        return entry
