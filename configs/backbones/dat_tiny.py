"""DAT-T for ImageNet-1k at 224x224 pixels.

    python tools/classify.py --config-file configs/backbones/dat_tiny.py \\
        --input IMAGE --weights WEIGHTS

Quoted from the authors: 82.03 % top-1, 95.85 % top-5, 29 M parameters, 4.6 GFLOPs.
Here 28,319,138 parameters and 4.589 GFLOPs at 224x224.
"""

from ..common.models.classifier import center_square, dat_classifier
from ..common.train import train

model = dat_classifier("dat_tiny")
preprocessing = center_square(224)
