"""The registry of whole models."""

from detectron2._absent import absent_name_getter
from fvcore.common.registry import Registry

__all__ = ["META_ARCH_REGISTRY"]
META_ARCH_REGISTRY = Registry("META_ARCH")
__getattr__ = absent_name_getter(__name__)
