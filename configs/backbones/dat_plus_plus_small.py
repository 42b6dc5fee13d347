"""DAT++-S for ImageNet-1k at 224x224 pixels.

    python tools/classify.py --config-file configs/backbones/dat_plus_plus_small.py \\
        --input IMAGE --weights WEIGHTS

Quoted from the authors: 84.6 % top-1, 53 M parameters, 9.4 GFLOPs.
Here 53,127,366 parameters and 9.426 GFLOPs at 224x224.
"""

from ..common.models.classifier import center_square, dat_classifier
from ..common.train import train

model = dat_classifier("dat_plus_plus_small")
preprocessing = center_square(224)
