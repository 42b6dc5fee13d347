"""Boxes, objects of an image, and batches of images."""

from .boxes import Boxes, BoxMode, pairwise_ioa, pairwise_iou
from .image_list import ImageList
from .instances import Instances
