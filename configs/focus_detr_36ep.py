"""Focus-DETR, ResNet-50, 4 scales, 36 epochs of COCO (50.4 AP quoted from the authors' README).

    python train_net.py --config-file configs/focus_detr_36ep.py --num-gpus 8

Schedule: Detectron2's 3x with a warm-up of 1,000 iterations. The name of the published checkpoint
agrees with the config that uses it; the repository also holds one that decays at epoch 20.
ResNet-101 (51.4 AP quoted): add model.detector.backbone.stages.depth=101
"""

from .common.schedule import lr_multiplier_3x as lr_multiplier
from .focus_detr_24ep import dataloader, model, optimizer, train

train.output_dir = "output/focus_detr_36ep"
train.max_iter = 270000
