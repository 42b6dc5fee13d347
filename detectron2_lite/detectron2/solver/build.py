"""Parameter groups for optimizers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# The first is the base of batch, synchronised batch and instance norms.
_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


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
    """Groups the trainable parameters, each taken once, by learning rate and weight decay.

    None leaves a setting to the optimizer. Parameters of normalisation layers and those called
    "bias" have settings of their own; ``lr_factor_func`` maps the full name of a parameter to a
    factor on ``base_lr``; ``overrides`` has settings by the last part of a name, which win over all
    others. ValueError for a factor without ``base_lr``, or two settings for "bias".
    """
    scales_bias = bias_lr_factor not in (None, 1.0)
    if base_lr is None and (scales_bias or lr_factor_func is not None):
        raise ValueError("bias_lr_factor and lr_factor_func multiply base_lr, which is not given.")
    bias = {"lr": base_lr * bias_lr_factor} if scales_bias else {}  # type: ignore[operator]
    if weight_decay_bias is not None:
        bias["weight_decay"] = weight_decay_bias
    if bias and "bias" in (overrides or {}):
        raise ValueError("overrides['bias'] contradicts bias_lr_factor or weight_decay_bias.")
    overrides = {**(overrides or {}), **({"bias": bias} if bias else {})}
    groups: dict[nn.Parameter, dict[str, Any]] = {}
    for module_name, module in model.named_modules():
        is_norm = isinstance(module, _NORM_LAYERS) and weight_decay_norm is not None
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in groups:
                continue
            lr, decay = base_lr, weight_decay_norm if is_norm else weight_decay
            if lr is not None and lr_factor_func is not None:
                lr *= lr_factor_func(f"{module_name}.{name}")
            settings = {"lr": lr, "weight_decay": decay, **overrides.get(name, {})}
            settings = {key: value for key, value in settings.items() if value is not None}
            groups[parameter] = {"params": [parameter], **settings}
    return reduce_param_groups(list(groups.values()))


def _expand_param_groups(params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One group per parameter; what comes later overrides what came earlier."""
    expanded: dict[torch.Tensor, dict[str, Any]] = {}
    for group in params:
        for index, parameter in enumerate(group["params"]):
            expanded.setdefault(parameter, {}).update(group)
            for key in group.keys() & {"params", "param_names"}:
                expanded[parameter][key] = [group[key][index]]
    return list(expanded.values())


def reduce_param_groups(params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges the groups with equal settings; optimizers run faster over few groups."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in _expand_param_groups(params):
        lists = {key: group.pop(key) for key in ("params", "param_names") if key in group}
        target = merged.setdefault(tuple(group.items()), group)
        for key, values in lists.items():
            target.setdefault(key, []).extend(values)
    return list(merged.values())
