"""DAT++-B for ImageNet-1k at 224x224 pixels.

    python tools/classify.py --config-file configs/backbones/dat_plus_plus_base.py \\
        --input IMAGE --weights WEIGHTS

Quoted from the authors: 84.9 % top-1, 93 M parameters, 16.6 GFLOPs.
Here 93,690,640 parameters and 16.559 GFLOPs at 224x224.
"""

from ..common.models.classifier import center_square, dat_classifier
from ..common.train import train

model = dat_classifier("dat_plus_plus_base")
preprocessing = center_square(224)
