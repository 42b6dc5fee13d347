"""Building the model of a config and what loads its weights, for all commands."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from traceback import walk_tb
from types import CodeType
from typing import Any

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from efficient_detr.data.datasets import class_names, register_files
from efficient_detr.engine.checkpointer import AtomicCheckpointer
from efficient_detr.engine.checks import dataset_names, lazy_nodes, target_of
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


def build_checkpointer(
    config: DictConfig,
    model: nn.Module,
    config_file: str | None = None,
    save_dir: str = "",
    **checkpointables: Any,
) -> AtomicCheckpointer:
    """The checkpointer of a config's model, which knows the classes of the config's data set.

    Args:
        config: a checked config. Read are ``train.allow_partial_checkpoint`` (optional), and the
            data sets: those of training if there is something to train, else that of the test.
        model: what `build_model` returned; it may be wrapped for distributed training.
        config_file: where the config is from, for errors; None if unknown.
        save_dir: folder of the checkpoints.
        **checkpointables: see `AtomicCheckpointer`.
    """
    return AtomicCheckpointer(
        model,
        save_dir,
        model_name=f"the config {config_file}" if config_file else "the model of the config",
        class_names=dataset_class_names(config, "train" if checkpointables else "test"),
        allow_partial=bool(OmegaConf.select(config, "train.allow_partial_checkpoint")),
        **checkpointables,
    )


def dataset_class_names(config: DictConfig, split: str) -> list[str] | None:
    """Class names of the data sets of ``dataloader.<split>``; None if they do not tell."""
    names = dataset_names(config, split)
    if not names:
        return None
    node = config.dataloader[split].dataset
    register_files(names, _given(node, "json_file"), _given(node, "image_root"))
    return class_names(names[0])


def _given(node: DictConfig, key: str) -> str | None:
    """A value that may be absent or left open ("???"): not every command needs a data set."""
    return None if OmegaConf.is_missing(node, key) else node.get(key)


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
