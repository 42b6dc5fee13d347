"""DETR, ResNet-50, 500 epochs of COCO.

    python train_net.py --config-file configs/detr.py --num-gpus 8
    python train_net.py --config-file configs/detr.py --eval-only train.init_checkpoint=detr.pth

Quoted from the authors: 42.0 AP, 41 M parameters, 86 GFLOPs (mean over 100 images of COCO).
Here 41.52 M parameters: 80 classes instead of the authors' 91 are 2,827 fewer.

    ResNet-101 (43.5 AP quoted)  model.detector.backbone.stages.depth=101
    300 epochs                   train.max_iter=2250000 lr_multiplier.milestones=[1500000,2250000]
    a dilated last stage         configs/detr_dc5.py
"""

from .common.data.coco_detr import dataloader
from .common.models.detr import model
from .common.optim import detr_adamw as optimizer
from .common.schedule import ITERATIONS_PER_EPOCH
from .common.schedule import lr_multiplier_500ep as lr_multiplier
from .common.train import train

# As the authors do: images without boxes take part as well.
dataloader.train.dataset.filter_empty = False
train.output_dir = "output/detr"
train.max_iter = 500 * ITERATIONS_PER_EPOCH
