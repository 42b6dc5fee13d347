"""ACT: DETR-DC5, ResNet-50, with clustered attention in the encoder, for trained DETR weights.

    python train_net.py --config-file configs/act_detr.py --eval-only \
        train.init_checkpoint=detr_dc5.pth
    python tools/measure_clusters.py --config-file configs/act_detr.py --input images/ \
        --opts train.init_checkpoint=detr_dc5.pth

The parameters are those of configs/detr_dc5.py, so its checkpoint fits as it is; projections are
drawn from seeds in the config. Here 41.5 M parameters.
Quoted second-hand from the paper, 32 rounds without any training: 42.6 AP (DETR-DC5: 43.3) and
58.2 of 73.4 GFLOPs in the transformer. What is saved depends on the images: see docs/act.md.

    ResNet-101               model.detector.backbone.stages.depth=101
    rounds of one layer      model.detector.encoder.layers.0.attention.query_clustering.rounds=20
    rounds of all layers     in a config: model = act_detr(backbone=resnet_dc5(50), rounds=20)
    stride 32                in a config: model = act_detr()
"""

from .common.models.act_detr import act_detr
from .common.models.backbones import resnet_dc5
from .detr_dc5 import dataloader, lr_multiplier, optimizer, train

model = act_detr(backbone=resnet_dc5(50))
train.output_dir = "output/act_detr"
