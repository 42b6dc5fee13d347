"""From configurations to objects."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf


def dump_dataclass(obj: Any) -> Any:
    """Turns a dataclass instance, nested ones included, into a dict for :func:`instantiate`."""
    assert not isinstance(obj, type), f"dump_dataclass() needs an instance, not {obj!r}."
    dumped: dict[str, Any] = {"_target_": _convert_target_to_string(type(obj))}
    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        if isinstance(value, (list, tuple)):
            value = [dump_dataclass(x) if dataclasses.is_dataclass(x) else x for x in value]
        dumped[field.name] = dump_dataclass(value) if dataclasses.is_dataclass(value) else value
    return dumped


def instantiate(cfg: Any) -> Any:
    """Builds the object that ``cfg`` describes.

    A mapping with ``_target_`` (a callable, its dotted name or a configuration of one) becomes the
    result of calling the target with the other entries, which are instantiated first. Lists are
    instantiated element by element, structured configurations become their dataclass, and whatever
    is left is returned as it is. A TypeError from a call is logged with the name of its target.
    """
    if isinstance(cfg, ListConfig):
        return ListConfig([instantiate(x) for x in cfg], flags={"allow_objects": True})
    if isinstance(cfg, list):
        return [instantiate(x) for x in cfg]
    if isinstance(cfg, DictConfig) and dataclasses.is_dataclass(cfg._metadata.object_type):
        return OmegaConf.to_object(cfg)
    if not (isinstance(cfg, Mapping) and "_target_" in cfg):
        return cfg
    arguments = {key: instantiate(value) for key, value in cfg.items()}
    target = name = instantiate(arguments.pop("_target_"))
    if isinstance(target, str):
        target = locate(target)
    elif hasattr(target, "__qualname__"):
        name = f"{target.__module__}.{target.__qualname__}"
    assert callable(target), f"_target_ {name} is not callable."
    try:
        return target(**arguments)
    except TypeError:
        logging.getLogger(__name__).error("Error when instantiating %s!", name)
        raise
