"""Registers COCO under ``$DETECTRON2_DATASETS``, by default the folder ``datasets``."""

import os

from .builtin_meta import _get_builtin_metadata
from .coco import register_coco_instances

# Name of the dataset: folder of the images and name of the annotation file.
_SPLITS = {
    "coco_2014_train": ("train2014", "instances_train2014"),
    "coco_2014_val": ("val2014", "instances_val2014"),
    "coco_2014_minival": ("val2014", "instances_minival2014"),
    "coco_2014_valminusminival": ("val2014", "instances_valminusminival2014"),
    "coco_2017_train": ("train2017", "instances_train2017"),
    "coco_2017_val": ("val2017", "instances_val2017"),
    "coco_2017_test": ("test2017", "image_info_test2017"),
    "coco_2017_test-dev": ("test2017", "image_info_test-dev2017"),
    "coco_2017_val_100": ("val2017", "instances_val2017_100"),
}


def register_all_coco(root: str) -> None:
    """Register the splits of COCO below ``root``/coco; the files need not exist yet."""
    for name, (images, annotations) in _SPLITS.items():
        json_file = os.path.join(root, "coco/annotations", annotations + ".json")
        register_coco_instances(name, _get_builtin_metadata("coco"), json_file, os.path.join(root, "coco", images))


register_all_coco(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
