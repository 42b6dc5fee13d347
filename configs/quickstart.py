"""A small Focus-DETR on generated pictures of handwritten digits, from random weights on a CPU.

    make quickstart
    python train_net.py --config-file configs/quickstart.py

The same parts as configs/focus_detr.py with smaller numbers: three levels of width 64, two encoder
and two decoder layers, a narrow ResNet. About five minutes on two idle cores.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
)

from .common.data.coco_detr import dataloader
from .common.models.focus_detr import focus_detr
from .common.optim import AdamW as optimizer
from .common.train import train


def narrow_resnet(stem_width, widths):
    """A ResNet of one basic block a stage with trained batch norm."""
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=stem_width, norm="BN"),
        stages=[
            L(ResNet.make_stage)(
                block_class=BasicBlock,
                num_blocks=1,
                stride_per_block=[stride],
                in_channels=before,
                out_channels=after,
                norm="BN",
            )
            for stride, before, after in zip(
                [1, 2, 2, 2], [stem_width, *widths[:-1]], widths, strict=True
            )
        ],
        out_features=["res3", "res4", "res5"],
    )


model = focus_detr(
    backbone=narrow_resnet(16, [24, 48, 96, 160]),
    in_channels=[48, 96, 160],
    num_classes=10,
    channels=64,
    num_heads=4,
    num_levels=3,
    num_points=2,
    hidden_channels=128,
    layer_keep_ratios=[1.0, 0.6],
    num_object_tokens=30,
    strides=[8, 16, 32],
    range_ends=[24, 48],
    decoder_layers=2,
    num_queries=20,
    num_denoising_queries=12,
    num_detections=20,
)
# Backbones name their maps differently.
model.detector.neck.in_features = "${..backbone.out_features}"
model.losses[0].class_weight = 2.0

dataloader.train.dataset.names = "quickstart_digits_train"
dataloader.train.dataset.filter_empty = False
# No flip: it turns digits into other shapes.
dataloader.train.mapper.augmentations = []
dataloader.train.mapper.crop_augmentations = None
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 0
dataloader.test.dataset.names = "quickstart_digits_val"
dataloader.test.mapper.augmentations = []
dataloader.test.num_workers = 0

optimizer.lr = 3e-3
optimizer.fused = True
# The backbone starts from random weights too: it learns as fast as the rest.
optimizer.params.lr_factor_func = None
train.output_dir = "output/quickstart"
train.max_iter = 1400
train.eval_period = 0
train.flops_images = 2
train.device = "cpu"
# Warm-up, then the full learning rate for half of the training, then a cosine down to a hundredth.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CompositeParamScheduler)(
        schedulers=[
            L(ConstantParamScheduler)(value=1.0),
            L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
        ],
        lengths=[0.5, 0.5],
        interval_scaling=["rescaled", "rescaled"],
    ),
    warmup_factor=0.01,
    warmup_length=0.05,
    warmup_method="linear",
)
