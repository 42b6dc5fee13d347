"""Dotted names to objects and back."""

import pydoc
from typing import Any

from fvcore.common.registry import Registry

__all__ = ["Registry", "locate"]


def locate(name: str) -> Any:
    """The object with a dotted name; ImportError if there is none."""
    found = pydoc.locate(name)
    if found is None:
        # pydoc stops at names that hide a module, as torch.optim.sgd.SGD; Hydra's search does not.
        from hydra.utils import _locate

        found = _locate(name)
    return found


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
