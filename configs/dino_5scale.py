"""DINO, ResNet-50, 5 scales, 12 epochs of COCO (49.4 AP official, 49.6 AP detrex, both quoted).

    python train_net.py --config-file configs/dino_5scale.py --num-gpus 8

The stride-4 map of the backbone joins the levels: four times the tokens, three times the GFLOPs.
"""

from .common.models.backbones import resnet
from .common.models.dino import dino
from .dino import dataloader, lr_multiplier, optimizer, train

model = dino(
    backbone=resnet(50, ["res2", "res3", "res4", "res5"]),
    in_features=["res2", "res3", "res4", "res5"],
    in_channels=[256, 512, 1024, 2048],
    num_levels=5,
)
train.output_dir = "output/dino_5scale"
