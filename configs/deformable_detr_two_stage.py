"""Two-stage Deformable DETR with box refinement ("++"), ResNet-50, 4 scales, 50 epochs of COCO.

    python train_net.py --config-file configs/deformable_detr_two_stage.py --num-gpus 8
    python train_net.py --config-file configs/deformable_detr_two_stage.py --eval-only \
        train.init_checkpoint=deformable_detr_two_stage.pth

Every token proposes a box; the queries start at the 300 best proposals.
Quoted from the authors: 46.9 AP with the released code (46.2 in the paper), 41 M parameters, 173
GFLOPs (mean over 100 images of COCO). Here 41.16 M parameters: seven heads of 80 classes instead of
the authors' 91 are 19,789 fewer. ResNet-101: model.detector.backbone.stages.depth=101
"""

from .common.models.deformable_detr import deformable_detr_two_stage
from .deformable_detr import dataloader, lr_multiplier, optimizer, train

model = deformable_detr_two_stage()
train.output_dir = "output/deformable_detr_two_stage"
