"""SMCA-DETR with one level, ResNet-50, 50 epochs of COCO.

    python train_net.py --config-file configs/smca_detr.py --num-gpus 8
    python train_net.py --config-file configs/smca_detr.py --eval-only \
        train.init_checkpoint=smca_detr.pth

Quoted from the authors' README: 41.0 AP after 50, 42.7 after 108 and 43.5 after 250 epochs. Their
code has 41.76 M parameters and needs 104.6 GFLOPs at 800x1333. Here 41.76 M parameters: 80 classes
instead of their 92 columns (91 category numbers, and one for no object that is trained like a class
without objects) are 3,084 fewer. Their weights load as they are: the columns of the 80 are taken.

    ResNet-101               model.detector.backbone.stages.depth=101
    another type of scale    model = smca(scale=HeadScale) of configs/common/models/smca.py
    wider Gaussians          model = smca(beta=16.0)
"""

from .common.data.coco_detr import dataloader
from .common.models.smca import model
from .common.optim import detr_adamw as optimizer
from .common.schedule import ITERATIONS_PER_EPOCH
from .common.schedule import lr_multiplier_50ep as lr_multiplier
from .common.train import train

# As the authors do: images without boxes take part as well.
dataloader.train.dataset.filter_empty = False
train.output_dir = "output/smca_detr"
train.max_iter = 50 * ITERATIONS_PER_EPOCH
