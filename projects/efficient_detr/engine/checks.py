"""Checks of config, command line and data before anything expensive happens.

Every finding is a :class:`UserError` with one sentence. Detectron2 itself would accept a mistyped
override silently as a new key and fail on a wrong path only after the model has been built.
"""

import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from efficient_detr.checkpoint.downloads import is_address, parse_address
from efficient_detr.data.datasets import (
    check_annotations,
    check_dataset_files,
    class_names,
    register_files,
)
from efficient_detr.engine.trainer import AMP_DTYPES
from efficient_detr.errors import UserError
from efficient_detr.ops import library

_ROOTS_OF_EVALUATION = ("model", "dataloader", "train")
_ROOTS_OF_TRAINING = (*_ROOTS_OF_EVALUATION, "optimizer", "lr_multiplier")
_ABSENT = object()
_TRAIN_OPTIONS_OF_EVALUATION = ("output_dir", "init_checkpoint", "device", "flops_images")
_TRAIN_OPTIONS = (
    *_TRAIN_OPTIONS_OF_EVALUATION,
    "max_iter",
    "amp.enabled",
    "amp.dtype",
    "clip_max_norm",
    "checkpointer.period",
    "eval_period",
    "log_period",
)


class _Rule(NamedTuple):
    """What a value of the config may be; a key that the config lacks is not looked at."""

    key: str
    kind: type[int] | type[float] | type[str]
    least: int | None = None
    or_null: bool = False

    def allows(self, value: Any) -> bool:
        if value is None:
            return self.or_null
        if self.kind is str:
            return isinstance(value, str) and bool(value.strip())
        numbers = (int, float) if self.kind is float else (int,)
        if isinstance(value, bool) or not isinstance(value, numbers):
            return False
        return self.least is None or value >= self.least

    def allowed(self) -> str:
        name = {int: "an integer", float: "a number", str: "a text that is not empty"}[self.kind]
        return name if self.least is None else f"{name} of {self.least} or more"


_RULES = (
    _Rule("train.output_dir", str),
    _Rule("train.max_iter", int, 1),
    _Rule("train.seed", int),
    # Null is no clipping, too.
    _Rule("train.clip_max_norm", float, 0, or_null=True),
    _Rule("train.log_period", int, 1),
    _Rule("train.checkpointer.period", int, 1),
    _Rule("train.eval_period", int, 0),
    _Rule("train.flops_images", int, 0),
    _Rule("optimizer.lr", float, 0),
    _Rule("dataloader.train.num_workers", int, 0),
    _Rule("dataloader.test.num_workers", int, 0),
)


def load_config(config_file: str, overrides: Sequence[str]) -> DictConfig:
    """Load a LazyConfig and apply overrides of the command line.

    Args:
        config_file: path of a ``.py`` or ``.yaml`` config.
        overrides: ``path.to.key=value`` in Hydra's grammar; ``+path.to.key=value`` adds a key that
            the config does not know. ``=None`` means what it means in Python, like ``=null``.

    Returns:
        The config with the overrides applied.

    Raises:
        UserError: if the file is missing or broken, or an override is malformed or unknown.
    """
    if not config_file:
        raise UserError("No config: name one with --config-file FILE, e.g. configs/focus_detr.py.")
    if not os.path.isfile(config_file):
        raise UserError(f"The config file {config_file} does not exist: check --config-file.")
    if not config_file.endswith((".py", ".yaml", ".yml")):
        raise UserError(f"The config file {config_file} must be a .py or .yaml file.")
    try:
        config = LazyConfig.load(config_file)
    # A config is a program: anything can go wrong in it.
    except Exception as error:
        raise UserError(
            f"The config file {config_file} cannot be loaded: {_line(error)}"
        ) from error
    if not isinstance(config, DictConfig) or config._is_none():
        raise UserError(f"The config file {config_file} cannot be loaded: it holds no keys.")
    # Hydra's grammar would read None as a string of four letters.
    overrides = [re.sub(r"=\s*None\s*$", "=null", override) for override in overrides]
    check_overrides(config, overrides)
    try:
        return LazyConfig.apply_overrides(config, overrides)
    except (KeyError, NotImplementedError, OmegaConfBaseException) as error:
        raise UserError(f"The overrides {list(overrides)} fail: {_line(error)}") from error


def check_overrides(config: DictConfig, overrides: Sequence[str]) -> None:
    """Check that each override changes something that the config or the built object knows.

    A new key is fine where the object that is built from its parent takes an argument of this name.

    Raises:
        UserError: naming the unknown key and the closest known one.
    """
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            if text.startswith("-"):
                raise UserError(
                    f"'{text}' stands among the overrides: put options of the command before them."
                ) from error
            key = text.partition("=")[0]
            if dotted := _dotted(key):
                raise UserError(
                    f"The override '{text}' counts in brackets: write '{dotted}' for '{key}'."
                ) from error
            raise UserError(
                f"The override '{text}' is not of the form path.to.key=value: values with spaces, "
                "brackets, commas, # or non-ASCII letters need inner quotes, e.g. "
                "\"train.output_dir='/a/b c'\"."
            ) from error
        if override.is_delete():
            raise UserError(f"'{text}': keys cannot be deleted; set the key to null instead.")
        if not override.is_add() and not _is_known(config, override.key_or_group.split(".")):
            raise UserError(_unknown_key(config, override.key_or_group))


def check_config(config: DictConfig, *, eval_only: bool = False, num_gpus: int = 0) -> None:
    """Check a whole config without building anything.

    Args:
        config: the config with all overrides applied.
        eval_only: whether only ``model``, ``dataloader`` and ``train`` are needed.
        num_gpus: processes that ``--num-gpus`` asks for.

    Raises:
        UserError: for the first of: a missing part, an argument that its target does not take, a
            value out of range, an unusable device or GPU count, a missing checkpoint, a missing or
            broken data set, a number of classes that does not match or an output folder that cannot
            be made.
    """
    check_parts(
        config,
        _ROOTS_OF_EVALUATION if eval_only else _ROOTS_OF_TRAINING,
        _TRAIN_OPTIONS_OF_EVALUATION if eval_only else _TRAIN_OPTIONS,
    )
    check_arguments(config)
    check_values(config)
    check_device(config, num_gpus)
    check_init_checkpoint(config)
    for node in ("test",) if eval_only else ("train", "test"):
        check_dataset(config, node)
    check_output_dir(config)


def check_parts(config: DictConfig, roots: Sequence[str], options: Sequence[str] = ()) -> None:
    """Check that a config has what a command reads of it.

    Args:
        config: the config with all overrides applied.
        roots: keys of its top level, ``train`` among them if there are options.
        options: keys below ``train``.

    Raises:
        UserError: naming those that it lacks.
    """
    missing = [root for root in roots if config.get(root) is None]
    if not missing and options and not isinstance(config.train, DictConfig):
        raise UserError(f"train={config.train} is not allowed: import it from configs/common.")
    missing = missing or [f"train.{key}" for key in options if not _holds(config.train, key)]
    if missing:
        raise UserError(
            f"The config lacks {' and '.join(missing)}: import it from configs/common, or see "
            "efficient_detr.engine.train.do_train for what a config holds."
        )


def check_values(config: DictConfig) -> None:
    """Check type and range of the numbers and texts that the config itself decides.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    for rule in _RULES:
        try:
            value = OmegaConf.select(config, rule.key, default=_ABSENT)
        except OmegaConfBaseException as error:
            raise UserError(f"{rule.key} cannot be read: {_line(error)}") from error
        if value is not _ABSENT and not rule.allows(value):
            shown = "null" if value is None else repr(value)
            raise UserError(f"{rule.key}={shown} is not allowed: give {rule.allowed()}.")


def check_output_dir(config: DictConfig) -> None:
    """Make the folder ``train.output_dir``.

    Raises:
        UserError: if it cannot be made.
    """
    folder = OmegaConf.select(config, "train.output_dir")
    if not folder or "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder train.output_dir={folder} cannot be made ({error.strerror or error}): "
            "give a folder that you may write to."
        ) from error


def check_arguments(config: DictConfig) -> None:
    """Check that every ``_target_`` takes all arguments that the config gives it.

    Raises:
        UserError: naming the argument, the target and the closest argument that it takes.
    """
    for path, node in lazy_nodes(config, ""):
        target = target_of(node)
        arguments = _accepted_arguments(target)
        for key in node:
            if arguments is None or key == "_target_" or key in arguments:
                continue
            name = getattr(target, "__qualname__", str(target))
            raise UserError(
                f"'{path}.{key}' is unknown: {name} takes no argument '{key}'"
                f"{_did_you_mean(str(key), arguments)}"
            )


def check_device(config: DictConfig, num_gpus: int) -> None:
    """Check ``train.device``, ``train.amp.dtype``, the number of GPUs and EFFICIENT_DETR_OPS.

    Raises:
        UserError: if this machine has not what they ask for.
    """
    text = str(OmegaConf.select(config, "train.device", default="cpu"))
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"train.device={text} is not allowed: give cpu, cuda or, e.g., cuda:0.")
    available = torch.cuda.device_count()
    if device.type == "cuda" and available == 0:
        raise UserError(
            f"train.device={text}, but PyTorch finds no GPU: add train.device=cpu, or install a "
            "CUDA build of PyTorch."
        )
    if device.type == "cuda" and (device.index or 0) >= available:
        raise UserError(
            f"train.device={text}, but this machine's GPUs are cuda:0 to cuda:{available - 1}: "
            "use one of them."
        )
    if device.type == "cuda" and num_gpus > available:
        raise UserError(f"--num-gpus {num_gpus}, but this machine has {available}: use fewer.")
    dtype = OmegaConf.select(config, "train.amp.dtype", default="bfloat16")
    if dtype not in AMP_DTYPES:
        raise UserError(f"train.amp.dtype={dtype} is unknown: use {' or '.join(AMP_DTYPES)}.")
    check_operators(device)


def check_operators(device: torch.device) -> None:
    """Check that the implementation which EFFICIENT_DETR_OPS asks for exists on a device.

    Raises:
        UserError: if it does not.
    """
    try:
        library.check(device)
    except (RuntimeError, ValueError) as error:
        raise UserError(_line(error)) from error


def check_init_checkpoint(config: DictConfig) -> None:
    """Check that ``train.init_checkpoint`` is a file that exists, or an address of a file.

    Raises:
        UserError: if it is not.
    """
    path = OmegaConf.select(config, "train.init_checkpoint", default="")
    if path and is_address(path):
        parse_address(path)
    elif path and not os.path.isfile(path.split("?")[0]):
        raise UserError(
            f"The checkpoint {path} does not exist: check train.init_checkpoint, or set "
            "train.init_checkpoint='' to start from random weights."
        )


def check_dataset(config: DictConfig, split: str) -> None:
    """Check names, files, annotations and classes of ``dataloader.<split>.dataset``.

    Data sets that are built by something without ``names`` are left to whoever builds them.

    Raises:
        UserError: for an unset or unknown name, a missing path, an incomplete annotation or a wrong
            number of classes.
    """
    node = OmegaConf.select(config, f"dataloader.{split}.dataset")
    if not isinstance(node, DictConfig):
        return
    for key in node:
        if OmegaConf.is_missing(node, key):
            raise UserError(
                f"dataloader.{split}.dataset.{key} is not set: add it to the command line as "
                f"dataloader.{split}.dataset.{key}=..."
            )
    names = dataset_names(config, split)
    register_files(names, node.get("json_file"), node.get("image_root"))
    for name in names:
        check_dataset_files(name)
        check_num_classes(config, name)
        check_annotations(name)


def check_num_classes(config: DictConfig, name: str) -> None:
    """Check that the model has as many classes as a data set.

    Raises:
        UserError: naming both numbers and the override that puts it right.
    """
    expected = OmegaConf.select(config, "model.num_classes")
    classes = class_names(name)
    if expected is None or classes is None or len(classes) == expected:
        return
    listed = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    raise UserError(
        f"The data set '{name}' has {len(classes)} classes ({listed}), but the model has "
        f"{expected}: add model.num_classes={len(classes)}."
    )


def dataset_names(config: DictConfig, split: str) -> list[str]:
    """Names of the data sets of ``dataloader.<split>``; empty if the config does not name them."""
    names = OmegaConf.select(config, f"dataloader.{split}.dataset.names")
    if names is None:
        return []
    return [names] if isinstance(names, str) else list(names)


def _holds(config: DictConfig, key: str) -> bool:
    return OmegaConf.select(config, key, default=_ABSENT) is not _ABSENT


def _is_known(config: DictConfig, parts: list[str]) -> bool:
    node: Any = config
    for part in parts:
        if isinstance(node, ListConfig):
            if not part.isdigit() or int(part) >= len(node):
                return False
            node = node._get_node(int(part))
        elif isinstance(node, DictConfig):
            if part not in node.keys():
                target = target_of(node)
                accepted = _accepted_arguments(target)
                return target is not None and (accepted is None or part in accepted)
            node = node._get_node(part)
        else:
            return False
        # An interpolation or a missing value stands for something that is decided later.
        if OmegaConf.is_config(node) and (node._is_interpolation() or node._is_missing()):
            return True
    return True


def _dotted(key: str) -> str | None:
    """A key with list indices between dots, where it has them in brackets; else None."""
    dotted, count = re.subn(r"\[(\d+)\]", r".\1", key)
    return dotted if count else None


def _unknown_key(config: DictConfig, key: str) -> str:
    known = list(_all_keys(config, ""))
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    # A forgotten prefix is as common as a misspelling: max_iter for train.max_iter.
    close = close or [k for k in known if k.endswith("." + key)][:1]
    if not close:
        last = difflib.get_close_matches(
            key.rsplit(".", 1)[-1], {k.rsplit(".", 1)[-1] for k in known}, n=1
        )
        close = [k for k in known if last and k.rsplit(".", 1)[-1] == last[0]][:1]
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return f"The config has no key '{key}'{hint} (Write +{key}=... to add it nevertheless.)"


def _all_keys(node: Any, prefix: str) -> Iterator[str]:
    """Dotted keys of the config and the further arguments that its targets take."""
    if isinstance(node, DictConfig):
        for key in dict.fromkeys([*node.keys(), *_further_arguments(node)]):
            yield f"{prefix}{key}"
            yield from _all_keys(_child(node, key), f"{prefix}{key}.")
    elif isinstance(node, ListConfig):
        for index in range(len(node)):
            yield from _all_keys(_child(node, index), f"{prefix}{index}.")


def lazy_nodes(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """All nodes with a ``_target_``, with their dotted paths.

    Args:
        node: config or part of one; anything else has none.
        path: the dotted path of ``node`` itself.
    """
    if isinstance(node, DictConfig):
        if "_target_" in node.keys():
            yield path, node
        for key in node.keys():
            yield from lazy_nodes(_child(node, key), f"{path}.{key}" if path else str(key))
    elif isinstance(node, ListConfig):
        for index in range(len(node)):
            yield from lazy_nodes(_child(node, index), f"{path}.{index}")


def _child(node: DictConfig | ListConfig, key: Any) -> Any:
    """A child with keys of its own; interpolations are looked into where they point."""
    child = node._get_node(key) if isinstance(node, ListConfig) or key in node.keys() else None
    if not isinstance(child, (DictConfig, ListConfig)):
        return None
    open_value = child._is_interpolation() or child._is_missing() or child._is_none()
    return None if open_value else child


def target_of(node: DictConfig) -> Callable[..., Any] | None:
    """What a node builds its object with; None if it has no ``_target_``, or none to call.

    Raises:
        UserError: if the target cannot be imported.
    """
    target = node.get("_target_") if "_target_" in node.keys() else None
    if isinstance(target, str):
        try:
            target = locate(target)
        except Exception as error:
            raise UserError(f"The config's _target_ '{target}' cannot be imported.") from error
    return target if callable(target) else None


def _further_arguments(node: DictConfig) -> Sequence[str]:
    return tuple(_accepted_arguments(target_of(node)) or ())


def _accepted_arguments(target: Callable[..., Any] | None) -> dict[str, inspect.Parameter] | None:
    """Keyword arguments that a target takes; None if it takes any or does not tell."""
    if target is None:
        return None
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return dict(parameters)


def _did_you_mean(key: str, candidates: dict[str, inspect.Parameter]) -> str:
    close = difflib.get_close_matches(key, candidates, n=1)
    return f"; did you mean '{close[0]}'?" if close else f" (it takes {', '.join(candidates)})."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
