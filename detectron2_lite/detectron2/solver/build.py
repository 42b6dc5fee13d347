"""Parameter groups for optimizers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from detectron2._absent import absent_name_getter

__getattr__ = absent_name_getter(__name__)

_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # batch, synchronised batch and instance norms
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: dict[str, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Groups the trainable parameters by learning rate and weight decay.

    Args:
        model: each of its parameters is taken once, even if modules share it.
        base_lr: learning rate; None leaves it to the optimizer.
        weight_decay: weight decay; None leaves it to the optimizer.
        weight_decay_norm: weight decay inside normalisation layers.
        bias_lr_factor: factor on the learning rate of parameters called "bias".
        weight_decay_bias: weight decay of parameters called "bias".
        lr_factor_func: maps the full name of a parameter to a factor on its learning rate.
        overrides: settings by the last part of a parameter's name; they win over all others.

    Raises:
        ValueError: a factor without ``base_lr``, or two settings for "bias".
    """
    if base_lr is None and (bias_lr_factor not in (None, 1.0) or lr_factor_func is not None):
        raise ValueError("bias_lr_factor and lr_factor_func multiply base_lr, which is not given.")
    defaults = {"lr": base_lr, "weight_decay": weight_decay}
    defaults = {key: value for key, value in defaults.items() if value is not None}
    overrides = dict(overrides or {})
    for_bias: dict[str, float] = {}
    if base_lr is not None and bias_lr_factor not in (None, 1.0):
        for_bias["lr"] = base_lr * bias_lr_factor
    if weight_decay_bias is not None:
        for_bias["weight_decay"] = weight_decay_bias
    if for_bias and "bias" in overrides:
        raise ValueError("overrides['bias'] contradicts bias_lr_factor or weight_decay_bias.")
    if for_bias:
        overrides["bias"] = for_bias

    groups: dict[nn.Parameter, dict[str, Any]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in groups:
                continue
            settings = dict(defaults)
            if isinstance(module, _NORM_LAYERS) and weight_decay_norm is not None:
                settings["weight_decay"] = weight_decay_norm
            if lr_factor_func is not None:
                settings["lr"] *= lr_factor_func(f"{module_name}.{name}")
            settings.update(overrides.get(name, {}))
            groups[parameter] = {"params": [parameter], **settings}
    return reduce_param_groups(list(groups.values()))


def _expand_param_groups(params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One group per parameter; what comes later overrides what came earlier."""
    expanded: dict[torch.Tensor, dict[str, Any]] = {}
    for group in params:
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for index, parameter in enumerate(group["params"]):
            own = expanded.setdefault(parameter, {"params": [parameter]})
            own.update(settings)
            if "param_names" in group:
                own["param_names"] = [group["param_names"][index]]
    return list(expanded.values())


def reduce_param_groups(params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges the groups with equal settings; optimizers run faster over few groups."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in _expand_param_groups(params):
        lists = {key: group.pop(key) for key in ("params", "param_names") if key in group}
        target = merged.setdefault(tuple(group.items()), dict(group))
        for key, values in lists.items():
            target.setdefault(key, []).extend(values)
    return list(merged.values())
