"""MTKD: fine-tune a trained DETR-DC5 so that dense and clustered attention see the same boxes.

    python train_net.py --config-file configs/act_detr_mtkd.py --num-gpus 8 \
        train.init_checkpoint=detr_dc5.pth
    python train_net.py --config-file configs/act_detr.py --eval-only \
        train.init_checkpoint=output/act_detr_mtkd/model_final.pth

Every image is detected twice with the same weights; evaluation is that of configs/act_detr.py.
Quoted second-hand from the paper: 43.1 AP with clustered attention, after "a few epochs" (DETR-DC5:
43.3; without distillation 42.6). Not published, and chosen here: 5 epochs, a tenth of DETR's
learning rate, its decay, the weight 1 of the distillation and the mean as its reduction. A larger
weight: model.losses.1.weight=5. ResNet-101: model.detector.backbone.stages.depth=101
"""

from .act_detr import dataloader, model, optimizer, train
from .common.models.act_detr import distilled
from .common.schedule import ITERATIONS_PER_EPOCH, step_schedule

model = distilled(model)
optimizer.lr = 1e-5
lr_multiplier = step_schedule(epochs=5, decay_epochs=[4])
train.output_dir = "output/act_detr_mtkd"
train.max_iter = 5 * ITERATIONS_PER_EPOCH
