"""DINO, ResNet-50, 4 scales, 24 epochs of COCO (50.4 AP official, 50.6 AP detrex, both quoted).

    python train_net.py --config-file configs/dino_24ep.py --num-gpus 8

The 24-epoch schedule uses the official position embedding (temperature 20, no offset) and also
trains on images without boxes.
"""

from .common.schedule import lr_multiplier_24ep as lr_multiplier
from .dino import dataloader, model, optimizer, train

model.detector.tokenizer.position_embedding.temperature = 20
model.detector.tokenizer.position_embedding.offset = 0.0
dataloader.train.dataset.filter_empty = False
train.output_dir = "output/dino_24ep"
train.max_iter = 180000
