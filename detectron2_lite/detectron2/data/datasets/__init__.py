"""Datasets in COCO's format."""

from detectron2._absent import absent_name_getter

from . import builtin as _builtin  # registers COCO
from .coco import convert_to_coco_json, load_coco_json, register_coco_instances

__getattr__ = absent_name_getter(__name__)
