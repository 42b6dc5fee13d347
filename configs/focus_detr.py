"""Focus-DETR, ResNet-50, 4 scales, 12 epochs of COCO.

    python train_net.py --config-file configs/focus_detr.py --num-gpus 8
    python train_net.py --config-file configs/focus_detr.py --eval-only \
        train.init_checkpoint=focus_detr.pth

Quoted from the authors' README: 48.8 AP after 12 epochs. 49.3 M parameters, 183 GFLOPs at 800x1333.
ResNet-101 (50.8 AP quoted): add model.detector.backbone.stages.depth=101
Own data: use dataloader of configs/common/data/custom_detr.py; set model.num_classes.
"""

from .common.data.coco_detr import dataloader
from .common.models.focus_detr import model
from .common.optim import AdamW as optimizer
from .common.schedule import lr_multiplier_12ep as lr_multiplier
from .common.train import train

train.output_dir = "output/focus_detr"
train.max_iter = 90000
