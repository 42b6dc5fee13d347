"""Focus-DETR as the paper words it, where the released code does something else.

    python train_net.py --config-file configs/focus_detr_paper.py --num-gpus 8

The object score is a product of probabilities instead of raw logits, foreground labels go by box
size with overlapping ranges instead of by distance to the sides, and a layer attends to the tokens
as the layers before left them instead of to the neck's. No checkpoint is published for it.
"""

from detectron2.config import LazyCall as L

from efficient_detr.losses import BoxSizeForeground
from efficient_detr.modeling.encoder import CurrentValues
from efficient_detr.modeling.selection import ProbabilityProductScore

from .focus_detr import dataloader, lr_multiplier, model, optimizer, train

model.detector.encoder.object_score = L(ProbabilityProductScore)()
model.detector.encoder.value_source = L(CurrentValues)()
model.losses[1].labels = L(BoxSizeForeground)(strides=[8, 16, 32, 64], ends=[64, 128, 256])
train.output_dir = "output/focus_detr_paper"
