"""DINO, ResNet-50, 4 scales, 12 epochs of COCO: the dense baseline of Focus-DETR.

    python train_net.py --config-file configs/dino.py --num-gpus 8

Quoted: 49.0 AP (official README), 49.2 AP (detrex). 47.7 M parameters, 293 GFLOPs at 800x1333.
"""

from .common.data.coco_detr import dataloader
from .common.models.dino import model
from .common.optim import AdamW as optimizer
from .common.schedule import lr_multiplier_12ep as lr_multiplier
from .common.train import train

train.output_dir = "output/dino"
train.max_iter = 90000
