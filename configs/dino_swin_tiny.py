"""DINO, Swin-T, 4 scales, 12 epochs of COCO: the dense baseline of Focus-DETR with Swin-T.

    python train_net.py --config-file configs/dino_swin_tiny.py --num-gpus 8 \
        train.init_checkpoint=swin_tiny_patch4_window7_224.pth

Quoted from detrex: 51.3 AP with the backbone trained on ImageNet-1k, 52.5 AP on ImageNet-22k; with
Swin-S 53.0 and 54.5 AP. Here 48.19 M parameters, 301 GFLOPs at 800x1333.
Swin-S: model.detector.backbone.depths=[2,2,18,2] model.detector.backbone.drop_path_rate=0.2
"""

from .common.data.coco_detr import dataloader
from .common.models.backbones import swin
from .common.models.dino import dino
from .common.optim import AdamW as optimizer
from .common.schedule import lr_multiplier_12ep as lr_multiplier
from .common.train import train

model = dino(backbone=swin("tiny"), in_features=("p1", "p2", "p3"), in_channels=(192, 384, 768))
train.output_dir = "output/dino_swin_tiny"
train.max_iter = 90000
