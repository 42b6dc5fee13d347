"""Parameter groups for models whose backbone is a hierarchical transformer: DAT or Swin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.modeling import Backbone
from detectron2.solver.build import get_default_optimizer_params, reduce_param_groups
from torch import nn

from efficient_detr.errors import ConfigError

_POSITION_TABLES = {"relative_position_bias_table", "position_bias", "absolute_pos_embed"}


def layerwise_optimizer_params(
    model: nn.Module,
    *,
    base_lr: float,
    lr_factor_func: Callable[[str], float] | None = None,
    lr_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups in which early blocks of the backbone learn slower, and norms do not decay.

    With n blocks in the backbone, the learning rate of block k = 1..n is

        base_lr * lr_factor_func(name) * lr_decay ** (n + 1 - k),

    as in BEiT (arXiv 2106.08254). The stem counts as k = 0, what reduces the map between two stages
    belongs to the block before it, and the norms of the outputs, which no ImageNet checkpoint has,
    are k = n + 1. `lr_decay` does not touch what is no part of the transformer, such as a pyramid
    around it.

    Weight decay is 0 for norms, biases, factors of channels and position tables anywhere in the
    model, as in the training of DAT and of Swin.

    Args:
        model: holds one or more backbones, e.g. `DAT` or Detectron2's `SwinTransformer`.
        base_lr: learning rate, positive.
        lr_factor_func: factor of the learning rate by the parameter's dotted name; None for 1.
        lr_decay: factor of one block more towards the stem, in (0, 1]; 1 for none.

    Returns:
        Groups for an optimizer, with "params", "lr" and, where it is 0, "weight_decay".

    Raises:
        ConfigError: if `lr_decay` is out of range, or no backbone has stages of blocks.
    """
    if not 0 < lr_decay <= 1:
        raise ConfigError(f"optimizer.params.lr_decay={lr_decay}: choose more than 0, at most 1.")
    distances = blocks_to_output(model)

    def factor(parameter_name: str) -> float:
        # Detectron2 puts a dot before the parameters of the model itself.
        name = parameter_name.removeprefix(".")
        other = 1.0 if lr_factor_func is None else lr_factor_func(name)
        return other * lr_decay ** distances.get(name, 0)

    groups = get_default_optimizer_params(model, base_lr=base_lr, lr_factor_func=factor)
    undecayed = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and _skips_weight_decay(name, parameter)
    ]
    # What comes later in the list overrides what came before.
    return reduce_param_groups([*groups, {"params": undecayed, "weight_decay": 0.0}])


def blocks_to_output(model: nn.Module) -> dict[str, int]:
    """Distance of the parameters of hierarchical backbones from the output, in blocks.

    Args:
        model: holds the backbones.

    Returns:
        n + 1 - k for every name of a parameter in a backbone, see `layerwise_optimizer_params`.

    Raises:
        ConfigError: if there is no such backbone.
    """
    distances: dict[str, int] = {}
    for prefix, module in model.named_modules():
        stages = _stages(module) if isinstance(module, Backbone) else None
        if stages is not None:
            before = f"{prefix}." if prefix else ""
            distances |= {before + name: d for name, d in _distances(module, stages).items()}
    if not distances:
        raise ConfigError(
            "optimizer.params: the model has no backbone of stages with blocks, such as DAT and "
            "Swin, whose blocks could learn at rates of their own; take the AdamW of "
            "configs/common/optim.py."
        )
    return distances


def _stages(backbone: nn.Module) -> str | None:
    """Name of the list whose members have `blocks`: DAT's "stages", Swin's "layers"."""
    for name, child in backbone.named_children():
        members = list(child.children()) if isinstance(child, nn.ModuleList) else []
        if members and all(isinstance(getattr(m, "blocks", None), nn.ModuleList) for m in members):
            return name
    return None


def _distances(backbone: nn.Module, stages: str) -> dict[str, int]:
    """Count blocks in the order of registration, which is the order of computation."""
    blocks = [
        f"{stages}.{i}.blocks.{j}"
        for i, stage in enumerate(backbone.get_submodule(stages).children())
        for j, _ in enumerate(stage.get_submodule("blocks").children())
    ]
    reached, distances = 0, {}
    for name, _ in backbone.named_parameters():
        block = ".".join(name.split(".")[:4])
        if block in blocks:
            reached = blocks.index(block) + 1
        elif reached > 0 and not name.startswith(f"{stages}."):
            reached = len(blocks) + 1
        distances[name] = len(blocks) + 1 - reached
    return distances


def _skips_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    parts = name.split(".")
    return parameter.dim() <= 1 or parts[-1] == "bias" or not _POSITION_TABLES.isdisjoint(parts)
