"""DAT++-T for ImageNet-1k at 224x224 pixels.

    python tools/classify.py --config-file configs/backbones/dat_plus_plus_tiny.py \\
        --input IMAGE --weights WEIGHTS

Quoted from the authors: 83.86 % top-1, 96.73 % top-5, 24 M parameters, 4.3 GFLOPs.
Here 23,962,876 parameters and 4.288 GFLOPs at 224x224.
"""

from ..common.models.classifier import center_square, dat_classifier
from ..common.train import train

model = dat_classifier("dat_plus_plus_tiny")
preprocessing = center_square(224)
