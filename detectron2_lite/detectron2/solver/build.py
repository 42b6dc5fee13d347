"""Parameter groups for optimizers."""

from collections.abc import Callable
from typing import Any

from torch import nn

# The first is the base of batch, synchronised batch and instance norms.
_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    *,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: dict[str, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Groups the trainable parameters, each taken once, by their settings.

    None leaves a setting to the optimizer. ``lr_factor_func`` maps the full name of a parameter to
    a factor on ``base_lr`` (ValueError without one); ``overrides`` has settings by the last part of
    a parameter's name, which win over all others.
    """
    if base_lr is None and lr_factor_func is not None:
        raise ValueError("lr_factor_func multiplies base_lr, which is not given.")
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        is_norm = isinstance(module, _NORM_LAYERS) and weight_decay_norm is not None
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            settings = {
                "lr": base_lr,
                "weight_decay": weight_decay_norm if is_norm else weight_decay,
            }
            if base_lr is not None and lr_factor_func is not None:
                settings["lr"] = base_lr * lr_factor_func(f"{module_name}.{name}")
            settings.update((overrides or {}).get(name, {}))
            settings = {key: value for key, value in settings.items() if value is not None}
            # Optimizers run faster over few groups.
            group = groups.setdefault(tuple(settings.items()), {"params": [], **settings})
            group["params"].append(parameter)
    return list(groups.values())
