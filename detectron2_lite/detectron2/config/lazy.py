"""Configuration files written in Python: loading, overriding and saving them."""

import builtins
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import cloudpickle
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode

from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import _convert_target_to_string

__all__ = ["LazyCall", "LazyConfig"]

# Marks the globals of configuration files, whose relative imports work by file path.
_CONFIG_PACKAGE = "detectron2._cfg_loader"
_ALLOW_OBJECTS = {"allow_objects": True}


class LazyCall:
    """Describes a call instead of making it: ``LazyCall(nn.Linear)(in_features=3, ...)``.

    Calling it with keyword arguments gives a DictConfig of them with the callable as ``_target_``,
    which can be edited and then built by :func:`detectron2.config.instantiate`.

    Raises:
        TypeError: the target is neither a callable, nor a dotted name, nor a configuration of one.
    """

    def __init__(self, target: Callable[..., Any] | str | Mapping[str, Any]) -> None:
        if not (callable(target) or isinstance(target, (str, Mapping))):
            raise TypeError(
                f"LazyCall needs a callable or something that defines one, not {target!r}."
            )
        # OmegaConf takes a dataclass for the schema of a node, so only its name is stored.
        self._target = _convert_target_to_string(target) if is_dataclass(target) else target

    def __call__(self, **kwargs: Any) -> DictConfig:
        return DictConfig({**kwargs, "_target_": self._target}, flags=_ALLOW_OBJECTS)


def _as_config(value: Any) -> Any:
    return DictConfig(value, flags=_ALLOW_OBJECTS) if isinstance(value, dict) else value


def _run_config_file(path: str) -> ModuleType:
    """Executes a file as a module of its own that ``sys.modules`` never sees."""
    with PathManager.open(path) as file:
        source = file.read()
    try:
        code = compile(source, path, "exec")
    except SyntaxError as error:
        raise SyntaxError(f"Config file {path} has a syntax error: {error}") from error
    module = ModuleType(f"{_CONFIG_PACKAGE}{uuid.uuid4().hex[:8]}.{os.path.basename(path)}")
    module.__file__ = path
    module.__package__ = module.__name__
    exec(code, vars(module))
    return module


def _resolve_relative_import(importer: str, name: str, level: int) -> str:
    """Path of the file that ``from <level dots><name> import ...`` in the file ``importer`` means."""
    folder = importer
    for _ in range(level):
        folder = os.path.dirname(folder)
    target = os.path.join(folder, *name.split("."))
    if not name or (PathManager.isdir(target) and not PathManager.isfile(target + ".py")):
        raise ImportError(
            f"{importer} imports the directory {target}; a relative import in a config file "
            "can only name another config file."
        )
    if not PathManager.isfile(target + ".py"):
        raise ImportError(f"{importer} imports {name}, but {target}.py does not exist.")
    return target + ".py"


@contextmanager
def _config_imports() -> Iterator[None]:
    """Gives relative imports inside configuration files their own meaning.

    They find files by path, whatever the packages; they run the file anew each time, so no edit of
    a loaded configuration leaks into the next; and dictionaries arrive as DictConfig.
    """
    original_import = builtins.__import__

    def import_config(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> ModuleType:
        package = (globals or {}).get("__package__") or ""
        if level == 0 or not package.startswith(_CONFIG_PACKAGE):
            return original_import(name, globals, locals, fromlist, level)
        module = _run_config_file(_resolve_relative_import(globals["__file__"], name, level))
        for key, value in vars(module).items():
            if not key.startswith("__"):
                setattr(module, key, _as_config(value))
        return module

    builtins.__import__ = import_config
    try:
        yield
    finally:
        builtins.__import__ = original_import


def _name_targets(cfg: Any) -> None:
    """Replaces, everywhere below ``cfg``, callable targets by their dotted names."""
    if isinstance(cfg, DictConfig):
        if "_target_" in cfg and callable(cfg._target_) and hasattr(cfg._target_, "__qualname__"):
            cfg._target_ = _convert_target_to_string(cfg._target_)
        for value in cfg.values():
            _name_targets(value)
    elif isinstance(cfg, ListConfig):
        for value in cfg:
            _name_targets(value)


def _save_yaml(cfg: Any, filename: str) -> None:
    """Writes the YAML text of a configuration.

    Raises:
        ValueError: the text was written, but it cannot be loaded again.
    """
    # Interpolations stay as written; structured configurations keep the name of their class.
    container = OmegaConf.to_container(
        cfg, resolve=False, structured_config_mode=SCMode.INSTANTIATE
    )
    text = yaml.dump(container, default_flow_style=None, allow_unicode=True, width=9999)
    with PathManager.open(filename, "w") as file:
        file.write(text)
    try:
        yaml.unsafe_load(text)
    except Exception as error:
        raise ValueError(
            f"{filename} is readable, but cannot be loaded: the config holds objects without a "
            "YAML form, such as lambdas."
        ) from error


class LazyConfig:
    """Loads, saves and overrides configurations of lazily constructed objects."""

    @staticmethod
    def load_rel(filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
        """:meth:`load` of a path relative to the source file of the caller."""
        caller = sys._getframe(1).f_code.co_filename
        assert caller != "<string>", "LazyConfig.load_rel() has to be called from a file."
        return LazyConfig.load(os.path.join(os.path.dirname(caller), filename), keys)

    @staticmethod
    def load(filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
        """Loads a ``.py``, ``.yaml`` or ``.yml`` configuration file.

        Args:
            filename: path or address of the file.
            keys: name of one object or a tuple of names; None loads all configurations of the file.

        Returns:
            The object, the tuple of objects, or a DictConfig of all of them without private names.

        Raises:
            ValueError: the name of the file has another ending.
            ImportError: a relative import in it names a directory or a missing file.
        """
        filename = filename.replace("/./", "/")
        is_python = filename.endswith(".py")
        if is_python:
            with _config_imports():
                loaded: Any = vars(_run_config_file(filename))
        elif filename.endswith((".yaml", ".yml")):
            with PathManager.open(filename) as file:
                loaded = OmegaConf.create(yaml.unsafe_load(file), flags=_ALLOW_OBJECTS)
        else:
            raise ValueError(f"Config file {filename} has to be a .py, .yaml or .yml file.")
        if isinstance(keys, str):
            return _as_config(loaded[keys])
        if keys is not None:
            return tuple(_as_config(loaded[key]) for key in keys)
        if is_python:
            loaded = {
                key: value
                for key, value in loaded.items()
                if isinstance(value, (dict, DictConfig, ListConfig)) and not key.startswith("_")
            }
        return _as_config(loaded)

    @staticmethod
    def save(cfg: Any, filename: str) -> None:
        """Writes a configuration as YAML, with dotted names for targets.

        What YAML cannot bring back (a lambda) is pickled to ``filename + ".pkl"``, with a warning.
        """
        logger = logging.getLogger(__name__)
        try:
            cfg = deepcopy(cfg)
        except Exception:
            logger.debug("The config cannot be copied; its targets are saved as objects.")
        else:
            _name_targets(cfg)
        try:
            _save_yaml(cfg, filename)
        except Exception as error:
            logger.warning("The config has no complete YAML form: %s", error)
            with PathManager.open(filename + ".pkl", "wb") as file:
                cloudpickle.dump(cfg, file)
            logger.warning("Config is saved using cloudpickle at %s.pkl.", filename)

    @staticmethod
    def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
        """Applies overrides such as ``"train.seed=3"`` (Hydra's grammar) to ``cfg``, in place.

        Raises:
            KeyError: a key leads through something that is not a configuration.
            NotImplementedError: the override is a deletion (``~key``).
        """
        from hydra.core.override_parser.overrides_parser import OverridesParser

        for override in OverridesParser.create().parse_overrides(overrides):
            if override.is_delete():
                raise NotImplementedError(f"{override.input_line}: keys cannot be deleted.")
            key = override.key_or_group
            parts = key.split(".")
            for length in range(1, len(parts)):
                prefix = ".".join(parts[:length])
                parent = OmegaConf.select(cfg, prefix, default=None)
                if parent is not None and not OmegaConf.is_config(parent):
                    raise KeyError(f"{key} cannot be set: {prefix} is the value {parent!r}.")
            OmegaConf.update(cfg, key, override.value(), merge=True)
        return cfg
