"""The registry of whole models."""

from detectron2._absent import absent_name_getter

from .build import META_ARCH_REGISTRY

__all__ = ["META_ARCH_REGISTRY"]
__getattr__ = absent_name_getter(__name__)
