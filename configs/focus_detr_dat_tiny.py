"""Focus-DETR, DAT-T, 4 scales, 12 epochs of COCO.

    python train_net.py --config-file configs/focus_detr_dat_tiny.py --num-gpus 8 \
        train.init_checkpoint=dat_tiny_in1k_224.pth

The backbone as published with "Vision Transformer with Deformable Attention" (arXiv 2201.00520) in
place of the ResNet-50 of configs/focus_detr.py. Nobody has published a DETR-type detector with DAT:
there is no AP to quote.
Here 49.91 M parameters, 235 GFLOPs at 800x1333, more than half of these
in the backbone, whose attention at stride 16 is dense. The models of 2022 were defined for square
images of one size: efficient_detr.modeling.backbones.dat says what happens at others.

    layer-wise decay  optimizer.params.lr_decay=0.9
    less memory       model.detector.backbone.gradient_checkpointing=True

DAT++ is the name "dat_plus_plus_tiny" and in_channels=[128, 256, 512] in a copy of this file.
"""

from efficient_detr.modeling.backbones.dat_variants import dat_backbone

from .common.models.focus_detr import focus_detr
from .common.optim import layerwise_detr_adamw as optimizer
from .focus_detr import dataloader, lr_multiplier, train

model = focus_detr(
    backbone=dat_backbone("dat_tiny"),
    in_features=["p1", "p2", "p3"],
    in_channels=[192, 384, 768],
)
train.output_dir = "output/focus_detr_dat_tiny"
