"""AdamW as the DETRs use it: the backbone learns ten times slower than the transformer."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from efficient_detr.engine.optim import backbone_lr_factor, deformable_lr_factor
from efficient_detr.modeling.backbones.parameter_groups import layerwise_optimizer_params


def adamw(*, lr, lr_factor_func, weight_decay_norm):
    """Config of AdamW; `weight_decay_norm` is for normalization layers, None for that of all."""
    return L(torch.optim.AdamW)(
        params=L(get_default_optimizer_params)(
            # params.model is set to the model when it has been built.
            base_lr="${..lr}",
            weight_decay_norm=weight_decay_norm,
            lr_factor_func=lr_factor_func,
        ),
        lr=lr,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
    )


def layerwise_adamw(*, lr, lr_factor_func, weight_decay):
    """Config of AdamW for DAT and Swin without decay for norms, biases and position tables.

    `params.lr_decay` below 1 lets early blocks of the backbone learn slower.
    """
    return L(torch.optim.AdamW)(
        params=L(layerwise_optimizer_params)(
            base_lr="${..lr}", lr_factor_func=lr_factor_func, lr_decay=1.0
        ),
        lr=lr,
        betas=(0.9, 0.999),
        weight_decay=weight_decay,
    )


# DINO and Focus-DETR. No decay for scale and shift of normalizations: they do not overfit, and
# shrinking them changes the size of every feature. The official DINO decays them as well.
AdamW = adamw(lr=1e-4, lr_factor_func=backbone_lr_factor, weight_decay_norm=0.0)

# DETR and what keeps its training: every parameter decays.
detr_adamw = adamw(lr=1e-4, lr_factor_func=backbone_lr_factor, weight_decay_norm=None)

# Deformable DETR and its heirs: sampling offsets and reference points learn slowly as well.
deformable_adamw = adamw(lr=2e-4, lr_factor_func=deformable_lr_factor, weight_decay_norm=None)

# DINO and Focus-DETR, or Deformable DETR, with DAT or Swin as the backbone.
layerwise_detr_adamw = layerwise_adamw(
    lr=1e-4, lr_factor_func=backbone_lr_factor, weight_decay=1e-4
)
layerwise_deformable_adamw = layerwise_adamw(
    lr=2e-4, lr_factor_func=deformable_lr_factor, weight_decay=1e-4
)
