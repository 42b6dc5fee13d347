"""Boxes, objects of an image, and batches of images."""

from detectron2._absent import absent_name_getter

from .boxes import Boxes, BoxMode, pairwise_iou
from .image_list import ImageList
from .instances import Instances

__getattr__ = absent_name_getter(__name__)
