"""Building the model of a config, for all commands."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from traceback import walk_tb
from types import CodeType

from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

from efficient_detr.engine.checks import lazy_nodes, target_of
from efficient_detr.errors import UserError


def build_model(config: DictConfig) -> nn.Module:
    """Build ``config.model``.

    Args:
        config: a checked config with a key ``model``.

    Raises:
        UserError: if a part of the model needs a package that is not installed; parts may raise it
            for other reasons, too.
    """
    try:
        model: nn.Module = instantiate(config.model)
    except ImportError as error:
        raise UserError(_missing(config, error)) from error
    return model


def _missing(config: DictConfig, error: ImportError) -> str:
    """The sentence about an import that failed."""
    path, node = _culprit(config, error)
    package = (error.name or "").split(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not package or find_spec(package) is not None:
        return f"{path} cannot be built: {' '.join(str(error).split())}"
    # Detectron2's Swin takes its stochastic depth from timm, and only if there is any.
    avoidable = package == "timm" and _drops_paths(node)
    return (
        f"{path} needs the package {package}, which is not installed: pip install {package}"
        f"{f', or set {path}.drop_path_rate=0' if avoidable else ''}."
    )


def _culprit(config: DictConfig, error: ImportError) -> tuple[str, DictConfig]:
    """The innermost part that was being built, with its dotted path."""
    parts = {
        code: (path, node)
        for path, node in lazy_nodes(config.model, "model")
        for code in _codes(target_of(node))
    }
    running = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    found = [parts[code] for code in running if code in parts]
    return found[-1] if found else ("model", config.model)


def _codes(target: object) -> Iterator[CodeType]:
    """The code that runs first when a target is called."""
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    code = getattr(inspect.unwrap(function), "__code__", None)  # type: ignore[arg-type]
    if code is not None:
        yield code


def _drops_paths(node: DictConfig) -> bool:
    target = target_of(node)
    return target is not None and "drop_path_rate" in inspect.signature(target).parameters
