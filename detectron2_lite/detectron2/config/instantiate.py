"""From configurations to objects."""

import logging
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf


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
    if isinstance(cfg, DictConfig) and is_dataclass(cfg._metadata.object_type):
        return OmegaConf.to_object(cfg)
    if not (isinstance(cfg, Mapping) and "_target_" in cfg):
        return cfg
    arguments = {key: instantiate(value) for key, value in cfg.items()}
    target = instantiate(arguments.pop("_target_"))
    target = locate(target) if isinstance(target, str) else target
    assert callable(target), f"_target_ {target!r} is not callable."
    try:
        return target(**arguments)
    except TypeError:
        logging.getLogger(__name__).error("Error when instantiating %s!", target)
        raise
