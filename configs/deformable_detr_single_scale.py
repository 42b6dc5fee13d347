"""Deformable DETR on the last feature map alone, ResNet-50, 50 epochs of COCO.

    python train_net.py --config-file configs/deformable_detr_single_scale.py --num-gpus 8
    python train_net.py --config-file configs/deformable_detr_single_scale.py --eval-only \
        train.init_checkpoint=deformable_detr_single_scale.pth

Quoted from the authors: 39.4 AP, 34 M parameters, 78 GFLOPs; with a dilated last stage (DC5) 41.5
AP, 34 M, 128 GFLOPs (means over 100 images of COCO). Here 34.06 M parameters: 80 classes instead of
the authors' 91 are 2,827 fewer. For DC5 add

    model.detector.backbone.stages._target_=efficient_detr.modeling.backbones.dilated_resnet_stages
"""

from .common.models.backbones import resnet
from .common.models.deformable_detr import deformable_detr
from .deformable_detr import dataloader, lr_multiplier, optimizer, train

model = deformable_detr(
    backbone=resnet(50, ["res5"], freeze_at=2),
    in_features=["res5"],
    in_channels=[2048],
    num_levels=1,
)
train.output_dir = "output/deformable_detr_single_scale"
