"""Detectron2's RetinaNet with DAT-T as the backbone, 12 epochs of COCO.

    python train_net.py --config-file configs/detectron2/retinanet_dat_tiny.py --num-gpus 8 \
        train.init_checkpoint=dat_tiny_in1k_224.pth

Needs the real Detectron2 (github.com/facebookresearch/detectron2), whose RetinaNet it is. 38.49 M
parameters. Settings follow the authors' detectors with DAT++, as those with the DAT of 2022 were
never published: the pyramid takes strides 8 to 32, images are cropped as DETR's, weight decay is
0.05. Extra levels come from the backbone's last map; the learning rate is for 16 images.
Detectron2's tools/lazyconfig_train_net.py trains it too, with the folder projects of this
repository in PYTHONPATH, but does not convert the authors' checkpoints.
"""

from detectron2 import model_zoo

from efficient_detr.modeling.backbones.dat_variants import dat_backbone

from ..common.data.coco_detr import dataloader
from ..common.data.constants import constants
from ..common.optim import layerwise_adamw
from ..common.schedule import lr_multiplier_12ep_warmup as lr_multiplier
from ..common.train import train

model = model_zoo.get_config("common/models/retinanet.py").model
model.backbone.bottom_up = dat_backbone("dat_tiny", drop_path_rate=0.0)
model.backbone.in_features = ["p1", "p2", "p3"]
# "p3" is the backbone's stride 32 here; the pyramid's own "p3" has stride 8.
model.backbone.top_block.in_feature = "p3"
model.backbone.top_block.in_channels = 768
model.pixel_mean = constants.imagenet_rgb256_mean
model.pixel_std = constants.imagenet_rgb256_std
model.input_format = "RGB"

optimizer = layerwise_adamw(lr=1e-4, lr_factor_func=None, weight_decay=0.05)
train.clip_max_norm = 0.0
train.output_dir = "output/retinanet_dat_tiny"
train.max_iter = 90000
