"""Configuration files in Python: loading, overriding and saving them."""

import builtins
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import cloudpickle
import yaml
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import _convert_target_to_string
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode

_CONFIG_PACKAGE = "detectron2._cfg_loader"  # marks the globals of configuration files
_FLAGS = {"allow_objects": True}
Keys = str | tuple[str, ...] | None


class LazyCall:
    """Describes a call instead of making it: ``LazyCall(nn.Linear)(in_features=3, ...)``.

    The result is a DictConfig of the arguments with the callable as ``_target_``, to be edited and
    instantiated. TypeError if the target is neither a callable, nor a name, nor a mapping.
    """

    def __init__(self, target: Callable[..., Any] | str | Mapping[str, Any]) -> None:
        if not (callable(target) or isinstance(target, (str, Mapping))):
            raise TypeError(f"LazyCall needs something that defines a callable, not {target!r}.")
        # OmegaConf takes a dataclass for the schema of a node, so only its name is stored.
        self._target = _convert_target_to_string(target) if is_dataclass(target) else target

    def __call__(self, **kwargs: Any) -> DictConfig:
        return DictConfig(dict(kwargs, _target_=self._target), flags=_FLAGS)


def _as_config(value: Any) -> Any:
    return DictConfig(value, flags=_FLAGS) if isinstance(value, dict) else value


def _run_config_file(path: str) -> ModuleType:
    """Executes a file as a module of its own that ``sys.modules`` never sees."""
    module = ModuleType(f"{_CONFIG_PACKAGE}.{os.path.basename(path)}")
    module.__file__, module.__package__ = path, module.__name__
    with PathManager.open(path) as file:
        exec(compile(file.read(), path, "exec"), vars(module))
    return module


def _find_relative_import(importer: str, name: str, level: int) -> str:
    """The file that ``from <level dots><name> import ...`` means in the file ``importer``."""
    for _ in range(level):
        importer = os.path.dirname(importer)
    target = os.path.join(importer, *name.split("."))
    if not PathManager.isfile(target + ".py"):
        raise ImportError(f"A relative import in a config needs {target}.py: it does not exist.")
    return target + ".py"


def _run_with_relative_imports(path: str) -> dict[str, Any]:
    """The globals of a configuration file, in which relative imports have their own meaning.

    They find files by path, whatever the packages; they run the file anew each time, so no edit of
    a loaded configuration leaks into the next; and dictionaries arrive as DictConfig.
    """
    original = builtins.__import__

    def import_config(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> ModuleType:
        package = (globals or {}).get("__package__") or ""
        if level == 0 or not package.startswith(_CONFIG_PACKAGE):
            return original(name, globals, locals, fromlist, level)
        module = _run_config_file(_find_relative_import(globals["__file__"], name, level))
        for key, value in vars(module).items():
            if not key.startswith("__"):
                setattr(module, key, _as_config(value))
        return module

    builtins.__import__ = import_config
    try:
        return vars(_run_config_file(path))
    finally:
        builtins.__import__ = original


def _with_named_targets(value: Any) -> Any:
    """A copy of plain containers in which callable targets are replaced by their dotted names."""
    if isinstance(value, list):
        return [_with_named_targets(item) for item in value]
    if not isinstance(value, dict):
        return value
    copied = {key: _with_named_targets(item) for key, item in value.items()}
    if hasattr(copied.get("_target_"), "__qualname__"):
        copied["_target_"] = _convert_target_to_string(copied["_target_"])
    return copied


class LazyConfig:
    """Loads, saves and overrides configurations of lazily constructed objects."""

    @staticmethod
    def load_rel(filename: str, keys: Keys = None) -> Any:
        """:meth:`load` of a path relative to the source file of the caller."""
        folder = os.path.dirname(sys._getframe(1).f_code.co_filename)
        return LazyConfig.load(os.path.join(folder, filename), keys)

    @staticmethod
    def load(filename: str, keys: Keys = None) -> Any:
        """Loads a ``.py``, ``.yaml`` or ``.yml`` file (else ValueError).

        ``keys``: a name for that object, a tuple of names for a tuple, None for all configurations
        of the file but those with private names, as one DictConfig.
        """
        if filename.endswith(".py"):
            loaded: Any = _run_with_relative_imports(filename.replace("/./", "/"))
        elif filename.endswith((".yaml", ".yml")):
            with PathManager.open(filename) as file:
                loaded = OmegaConf.create(yaml.unsafe_load(file), flags=_FLAGS)
        else:
            raise ValueError(f"Config file {filename} has to be a .py, .yaml or .yml file.")
        if isinstance(keys, str):
            return _as_config(loaded[keys])
        if keys is not None:
            return tuple(_as_config(loaded[key]) for key in keys)
        if filename.endswith(".py"):
            kinds = (dict, DictConfig, ListConfig)
            loaded = {k: v for k, v in loaded.items() if isinstance(v, kinds) and k[0] != "_"}
        return _as_config(loaded)

    @staticmethod
    def save(cfg: Any, filename: str) -> None:
        """Writes a configuration as YAML, with dotted names for targets.

        What YAML cannot bring back (a lambda) is pickled to ``filename + ".pkl"``, with a warning.
        """
        try:
            # Interpolations stay as written; dataclasses keep their names.
            container = OmegaConf.to_container(cfg, structured_config_mode=SCMode.INSTANTIATE)
            named = _with_named_targets(container)
            text = yaml.dump(named, default_flow_style=None, allow_unicode=True, width=9999)
            with PathManager.open(filename, "w") as file:
                file.write(text)
            yaml.unsafe_load(text)
        except Exception as error:
            message = "%s cannot be loaded again (%s): the config is pickled to %s.pkl."
            logging.getLogger(__name__).warning(message, filename, error, filename)
            with suppress(Exception), PathManager.open(filename + ".pkl", "wb") as file:
                cloudpickle.dump(cfg, file)

    @staticmethod
    def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
        """Applies ``path.key=value`` overrides in Hydra's grammar, in place; new keys are allowed.

        KeyError if a key lies below a plain value; NotImplementedError for deletions (``~key``).
        """
        for override in OverridesParser.create().parse_overrides(overrides):
            if override.is_delete():
                raise NotImplementedError(f"{override.input_line}: keys cannot be deleted.")
            key = override.key_or_group
            for end in (index for index, letter in enumerate(key) if letter == "."):
                value = OmegaConf.select(cfg, key[:end], default=None)
                if value is not None and not OmegaConf.is_config(value):
                    raise KeyError(f"{key} cannot be set: {key[:end]} is the value {value!r}.")
            OmegaConf.update(cfg, key, override.value(), merge=True)
        return cfg
