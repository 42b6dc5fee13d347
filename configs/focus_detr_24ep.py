"""Focus-DETR, ResNet-50, 4 scales, 24 epochs of COCO (50.3 AP quoted from the authors' README).

    python train_net.py --config-file configs/focus_detr_24ep.py --num-gpus 8

The longer schedules use the position embedding of the official DINO: temperature 20, no offset.
ResNet-101 (51.2 AP quoted): add model.detector.backbone.stages.depth=101
"""

from .common.schedule import lr_multiplier_24ep as lr_multiplier
from .focus_detr import dataloader, model, optimizer, train

model.detector.tokenizer.position_embedding.temperature = 20
model.detector.tokenizer.position_embedding.offset = 0.0
train.output_dir = "output/focus_detr_24ep"
train.max_iter = 180000
