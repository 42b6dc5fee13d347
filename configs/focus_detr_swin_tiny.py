"""Focus-DETR, Swin-T, 4 scales, 12 epochs of COCO.

    python train_net.py --config-file configs/focus_detr_swin_tiny.py --num-gpus 8 \
        train.init_checkpoint=swin_tiny_patch4_window7_224.pth
    python train_net.py --config-file configs/focus_detr_swin_tiny.py --eval-only \
        train.init_checkpoint=focus_detr_swin_tiny.pth

Quoted from the authors' README, with the backbone trained on ImageNet-1k: 50.0 AP after 12 epochs,
51.2 after 24, 52.5 after 36, and 53.2 after 36 with a backbone trained on ImageNet-22k.
Here 49.88 M parameters, 192 GFLOPs at 800x1333. Position embeddings stay those of the 12 epochs:

    24 epochs    train.max_iter=180000 lr_multiplier.milestones=[150000,180000]
    36 epochs    train.max_iter=270000 lr_multiplier.milestones=[225000,270000]
    Swin-S       model.detector.backbone.depths=[2,2,18,2]
    less memory  model.detector.backbone.use_checkpoint=True
"""

from .common.data.coco_detr import dataloader
from .common.models.backbones import swin
from .common.models.focus_detr import focus_detr
from .common.optim import AdamW as optimizer
from .common.schedule import lr_multiplier_12ep as lr_multiplier
from .common.train import train

model = focus_detr(
    backbone=swin("tiny"), in_features=("p1", "p2", "p3"), in_channels=(192, 384, 768)
)
train.output_dir = "output/focus_detr_swin_tiny"
train.max_iter = 90000
