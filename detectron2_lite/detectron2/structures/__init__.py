"""Boxes, objects of an image, and batches of images."""

from detectron2._absent import absent_name_getter

from .boxes import Boxes, BoxMode, pairwise_ioa, pairwise_iou
from .image_list import ImageList
from .instances import Instances

__all__ = ["BoxMode", "Boxes", "ImageList", "Instances", "pairwise_ioa", "pairwise_iou"]
__getattr__ = absent_name_getter(__name__)
