"""Helpers that every other package builds on."""

from detectron2._absent import absent_name_getter

__getattr__ = absent_name_getter(__name__)
