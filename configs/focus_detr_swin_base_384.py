"""Focus-DETR, Swin-B with windows of 12 cells, 4 scales, 36 epochs of COCO.

    python train_net.py --config-file configs/focus_detr_swin_base_384.py --num-gpus 8 \
        train.init_checkpoint=swin_base_patch4_window12_384_22k.pth
    python train_net.py --config-file configs/focus_detr_swin_base_384.py --eval-only \
        train.init_checkpoint=focus_detr_swin_base_384.pth

The backbone was trained on ImageNet-22k with images of 384 pixels; detectors take any size.
Quoted from the authors' README: 56.2 AP. Here 109.95 M parameters, 462 GFLOPs at 800x1333.
Their config for 224 pixels has this backbone as well, but the schedule for 12 epochs; as schedules
stretch to the training, that decays after 33 of 36: lr_multiplier.milestones=[247500,270000]
Swin-L (56.3 AP quoted): put swin("large_384") with in_channels=(384, 768, 1536) into this file.
"""

from .common.data.coco_detr import dataloader
from .common.models.backbones import swin
from .common.models.focus_detr import focus_detr
from .common.optim import AdamW as optimizer
from .common.schedule import lr_multiplier_36ep as lr_multiplier
from .common.train import train

model = focus_detr(
    backbone=swin("base_384"), in_features=("p1", "p2", "p3"), in_channels=(256, 512, 1024)
)
train.output_dir = "output/focus_detr_swin_base_384"
train.max_iter = 270000
