"""SMCA-DETR with three levels and scale selection (the paper's), ResNet-50, 50 epochs of COCO.

    python train_net.py --config-file configs/smca_detr_multi_scale.py --num-gpus 8

Quoted from the paper: 43.7 AP after 50 epochs, 45.6 after 108; DAB-DETR's tables add 40 M
parameters and 152 GFLOPs. ResNet-101: 44.4 AP quoted, model.detector.backbone.stages.depth=101

The authors released neither code nor weights of this model. Two encoder layers inside the levels,
one across them and two inside follow the paper. What it does not say is taken from their later
code: the factors 0.5, 1 and 2 on distances, the embedding of the level, and stride 64 by a 3x3
convolution. Here 39.75 M parameters; with the authors' 92 columns instead of 80 classes it would be
3,084 more, 39,752,308.
"""

from .common.models.smca import smca_multi_scale
from .smca_detr import dataloader, lr_multiplier, optimizer, train

model = smca_multi_scale()
train.output_dir = "output/smca_detr_multi_scale"
