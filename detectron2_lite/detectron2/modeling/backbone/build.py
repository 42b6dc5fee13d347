"""The registry of backbones."""

from fvcore.common.registry import Registry

BACKBONE_REGISTRY = Registry("BACKBONE")
