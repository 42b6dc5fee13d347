"""SMCA-DETR with four levels and a convolutional encoder, ResNet-50, 50 epochs of COCO.

    python train_net.py --config-file configs/smca_detr_conv.py --num-gpus 8
    python train_net.py --config-file configs/smca_detr_conv.py --eval-only \
        train.init_checkpoint=smca_detr_conv.pth

The authors' "new multi scale" code, which has no paper. Quoted from their training logs, with
kernels of 7 cells, 6 encoder layers and 50 epochs:

    44.4 AP, 40.76 M trainable parameters    one convolution for all pairs of levels (this config)
    44.3 AP, 41.07 M                         one for each: model = smca_conv(shared=False)
    45.7 AP, 60.01 M                         ResNet-101, one for each

Their published code, which has no log: smca_conv(kernel_size=5, shared=False, encoder_layers=5).
Their model needs 204 GFLOPs at 800x1333. Here 40.98 M parameters, 40.76 M of them trainable: 80
classes instead of their 92 columns are 3,084 fewer; of their weights those of the 80 are taken.
Unlike theirs, the images of a batch do not share the level weights of the first one.
ResNet-101: model.detector.backbone.stages.depth=101
"""

from .common.models.smca import smca_conv
from .smca_detr import dataloader, lr_multiplier, optimizer, train

model = smca_conv()
train.output_dir = "output/smca_detr_conv"
