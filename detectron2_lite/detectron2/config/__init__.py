"""Configurations that are Python files, and their lazily constructed objects."""

from .instantiate import instantiate
from .lazy import LazyCall, LazyConfig
