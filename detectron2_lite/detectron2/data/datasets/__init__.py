"""Datasets in COCO's format."""

from . import builtin as _builtin  # registers COCO
from .coco import convert_to_coco_json, load_coco_json, register_coco_instances
