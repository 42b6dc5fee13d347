"""Configurations that are Python files, and their lazily constructed objects."""

from detectron2.config.lazy import LazyCall, LazyConfig, instantiate
