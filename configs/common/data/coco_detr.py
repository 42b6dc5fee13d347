"""COCO with the augmentations of DETR.

`dataloader` goes into a config that also has `train` (for the seed and the output folder). Own data
in COCO format: see custom_detr.py beside this file.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator
from omegaconf import OmegaConf

from efficient_detr.data.datasets import detection_dataset
from efficient_detr.data.loader import build_train_loader
from efficient_detr.data.mapper import DetrDatasetMapper

_TRAIN_SHORT_SIDES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
_MAX_LONG_SIDE = 1333

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(detection_dataset)(names="coco_2017_train", filter_empty=True),
    mapper=L(DetrDatasetMapper)(
        is_train=True,
        augmentations=[
            L(T.RandomFlip)(),
            L(T.ResizeShortestEdge)(
                short_edge_length=_TRAIN_SHORT_SIDES,
                max_size=_MAX_LONG_SIDE,
                sample_style="choice",
            ),
        ],
        # Taken instead for half of the images; None switches it off.
        crop_augmentations=[
            L(T.RandomFlip)(),
            L(T.ResizeShortestEdge)(short_edge_length=[400, 500, 600], sample_style="choice"),
            # Height and width of the crop are drawn from 384..600 pixels.
            L(T.RandomCrop)(crop_type="absolute_range", crop_size=[384, 600]),
            L(T.ResizeShortestEdge)(
                short_edge_length=_TRAIN_SHORT_SIDES,
                max_size=_MAX_LONG_SIDE,
                sample_style="choice",
            ),
        ],
        image_format="RGB",
    ),
    total_batch_size=16,
    aspect_ratio_grouping=True,
    num_workers=4,
    seed="${train.seed}",
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(detection_dataset)(names="coco_2017_val", filter_empty=False),
    mapper=L(DetrDatasetMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=_MAX_LONG_SIDE)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(COCOEvaluator)(
    dataset_name="${..test.dataset.names}",
    output_dir="${train.output_dir}/inference",
)
