"""The part of Detectron2's API on which DETR training and evaluation stand."""

import sys

from detectron2._absent import Finder, absent_name_getter

__version__ = "0.6"
__lite__ = True
__getattr__ = absent_name_getter(__name__)
sys.meta_path.insert(0, Finder)
