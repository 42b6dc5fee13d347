"""DETR-DC5, ResNet-50 with a dilated last stage of stride 16, 500 epochs of COCO.

    python train_net.py --config-file configs/detr_dc5.py --num-gpus 8
    python train_net.py --config-file configs/detr_dc5.py --eval-only \
        train.init_checkpoint=detr_dc5.pth

Four times the tokens of configs/detr.py with the same parameters: small objects gain most.
Quoted from the authors: 43.3 AP, 41 M parameters, 187 GFLOPs (mean over 100 images of COCO); they
train with one image a GPU. ResNet-101 (44.9 AP quoted): model.detector.backbone.stages.depth=101
"""

from .common.models.backbones import resnet_dc5
from .detr import dataloader, lr_multiplier, model, optimizer, train

model.detector.backbone = resnet_dc5(50)
train.output_dir = "output/detr_dc5"
