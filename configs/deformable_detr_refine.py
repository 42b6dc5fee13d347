"""Deformable DETR with iterative box refinement, ResNet-50, 4 scales, 50 epochs of COCO.

    python train_net.py --config-file configs/deformable_detr_refine.py --num-gpus 8
    python train_net.py --config-file configs/deformable_detr_refine.py --eval-only \
        train.init_checkpoint=deformable_detr_refine.pth

Each decoder layer corrects the boxes of the layer before with a head of its own.
Quoted from the authors: 46.2 AP with the released code (45.4 in the paper), 41 M parameters, 173
GFLOPs (mean over 100 images of COCO). Here 40.83 M parameters: six heads of 80 classes instead of
the authors' 91 are 16,962 fewer. ResNet-101: model.detector.backbone.stages.depth=101
"""

from .common.models.deformable_detr import deformable_detr_refine
from .deformable_detr import dataloader, lr_multiplier, optimizer, train

model = deformable_detr_refine()
train.output_dir = "output/deformable_detr_refine"
