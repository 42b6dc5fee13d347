"""Parts of models whose packages are missing."""

import importlib
from typing import Any

from torch import nn


class Lacking(nn.Module):
    """Imports a package while it is built, as Detectron2's Swin does with timm.

    Args:
        package: what is imported.
        drop_path_rate: not used.
    """

    def __init__(self, *, package: str, drop_path_rate: float = 0.1) -> None:
        super().__init__()
        importlib.import_module(package)


class Whole(nn.Module):
    """Has parts.

    Args:
        parts: a module, or several in a list.
    """

    def __init__(self, *, parts: Any) -> None:
        super().__init__()


def lacking_function(*, name: str) -> None:
    """Fail as a library does that is told not to look for a module of this name."""
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
