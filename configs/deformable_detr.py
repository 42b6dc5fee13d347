"""Deformable DETR, ResNet-50, 4 scales, 50 epochs of COCO.

    python train_net.py --config-file configs/deformable_detr.py --num-gpus 8
    python train_net.py --config-file configs/deformable_detr.py --eval-only \
        train.init_checkpoint=deformable_detr.pth

Quoted from the authors: 44.5 AP with the released code (43.8 in the paper), 40 M parameters, 173
GFLOPs (mean over 100 images of COCO). Here 40.07 M parameters: 80 classes instead of the authors'
91 are 2,827 fewer. ResNet-101: model.detector.backbone.stages.depth=101
"""

from .common.data.coco_detr import dataloader
from .common.models.deformable_detr import model
from .common.optim import deformable_adamw as optimizer
from .common.schedule import ITERATIONS_PER_EPOCH
from .common.schedule import lr_multiplier_50ep as lr_multiplier
from .common.train import train

dataloader.train.dataset.filter_empty = False
# Twice the images of the other configs an iteration, so half the iterations for the same epochs.
dataloader.train.total_batch_size = 32
train.output_dir = "output/deformable_detr"
train.max_iter = 50 * ITERATIONS_PER_EPOCH // 2
