"""DAT-S for ImageNet-1k at 224x224 pixels.

    python tools/classify.py --config-file configs/backbones/dat_small.py \\
        --input IMAGE --weights WEIGHTS

Quoted from the authors: 83.69 % top-1, 96.39 % top-5, 50 M parameters, 9.0 GFLOPs.
Here 49,700,402 parameters and 9.008 GFLOPs at 224x224.
"""

from ..common.models.classifier import center_square, dat_classifier
from ..common.train import train

model = dat_classifier("dat_small")
preprocessing = center_square(224)
