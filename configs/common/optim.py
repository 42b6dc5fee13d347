"""AdamW as the DETRs use it: the backbone learns ten times slower than the transformer."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from efficient_detr.engine.optim import backbone_lr_factor

AdamW = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        # params.model is set to the model when it has been built.
        base_lr="${..lr}",
        # No decay for scale and shift of normalizations: they do not overfit, and shrinking them
        # changes the size of every feature. The official DINO decays them as well.
        weight_decay_norm=0.0,
        lr_factor_func=backbone_lr_factor,
    ),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
)
