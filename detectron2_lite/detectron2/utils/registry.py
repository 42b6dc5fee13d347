"""Dotted names to objects and back."""

from typing import Any

from fvcore.common.registry import Registry
from hydra.utils import _locate as locate

__all__ = ["Registry", "locate"]


def _convert_target_to_string(target: Any) -> str:
    """Shortest dotted name of a class or function that still locates it."""
    parts = target.__module__.split(".")
    for length in range(1, len(parts)):
        candidate = ".".join([*parts[:length], target.__qualname__])
        try:
            if locate(candidate) is target:
                return candidate
        except ImportError:
            continue
    return f"{target.__module__}.{target.__qualname__}"
