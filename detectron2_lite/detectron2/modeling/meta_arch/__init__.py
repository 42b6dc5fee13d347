"""The registry of whole models."""

from fvcore.common.registry import Registry

META_ARCH_REGISTRY = Registry("META_ARCH")
