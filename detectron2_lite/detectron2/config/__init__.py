"""Configurations that are Python files, and their lazily constructed objects."""

from detectron2._absent import absent_name_getter
from detectron2.config.lazy import LazyCall, LazyConfig, instantiate

__getattr__ = absent_name_getter(__name__)
