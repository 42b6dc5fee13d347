"""Detectron2's Mask R-CNN with DAT-T as the backbone, 12 epochs of COCO.

    python train_net.py --config-file configs/detectron2/mask_rcnn_dat_tiny.py --num-gpus 8 \
        train.init_checkpoint=dat_tiny_in1k_224.pth

Needs the real Detectron2 (github.com/facebookresearch/detectron2), whose Mask R-CNN it is. Weight
decay and warm-up follow the authors' detectors with DAT++, as those with the DAT of 2022 were never
published; images are resized as Detectron2 does. The learning rate is for 16 images. The number of
classes is model.roi_heads.num_classes. 47.83 M parameters.
Detectron2's tools/lazyconfig_train_net.py trains it too, with the folder projects of this
repository in PYTHONPATH, but does not convert the authors' checkpoints.
"""

from detectron2 import model_zoo

from efficient_detr.modeling.backbones.dat_variants import dat_backbone

from ..common.data.constants import constants
from ..common.optim import layerwise_adamw
from ..common.schedule import lr_multiplier_12ep_warmup as lr_multiplier
from ..common.train import train

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.evaluator.output_dir = "${train.output_dir}/inference"

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up = dat_backbone(
    "dat_tiny", out_features=["p0", "p1", "p2", "p3"], drop_path_rate=0.0
)
model.backbone.in_features = ["p0", "p1", "p2", "p3"]
model.pixel_mean = constants.imagenet_rgb256_mean
model.pixel_std = constants.imagenet_rgb256_std
model.input_format = "RGB"

optimizer = layerwise_adamw(lr=1e-4, lr_factor_func=None, weight_decay=0.05)
train.clip_max_norm = 0.0
train.output_dir = "output/mask_rcnn_dat_tiny"
train.max_iter = 90000
