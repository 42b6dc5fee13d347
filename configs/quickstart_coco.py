"""The small Focus-DETR of the quickstart on own data in COCO format, from random weights.

    python train_net.py --config-file configs/quickstart_coco.py model.num_classes=3 \
        dataloader.train.dataset.json_file=cells/train.json \
        dataloader.train.dataset.image_root=cells/train \
        dataloader.test.dataset.json_file=cells/val.json \
        dataloader.test.dataset.image_root=cells/val

Images are resized to a short side of about 192 pixels, so objects should be a tenth of it or more.
Half an hour on two cores brings a few hundred images with few classes to a useful detector; for
anything larger, start from configs/focus_detr.py and a GPU.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from .common.data.custom_detr import dataloader
from .quickstart import lr_multiplier, model, optimizer, train

model.num_classes = 80
model.detector.queries.num_queries = 60
model.detector.denoising.num_queries = 60
model.postprocessor.num_detections = 100
model.losses[1].labels.ends = [32, 64]

dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(),
    L(T.ResizeShortestEdge)(
        short_edge_length=[160, 176, 192, 208, 224], max_size=384, sample_style="choice"
    ),
]
dataloader.train.mapper.crop_augmentations = [
    L(T.RandomFlip)(),
    L(T.RandomCrop)(crop_type="relative_range", crop_size=[0.6, 0.6]),
    L(T.ResizeShortestEdge)(
        short_edge_length=[160, 176, 192, 208, 224], max_size=384, sample_style="choice"
    ),
]
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 0
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=192, max_size=384)
]
dataloader.test.num_workers = 0

train.output_dir = "output/quickstart_coco"
train.max_iter = 3000
