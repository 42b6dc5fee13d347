"""DAT-B for ImageNet-1k at 224x224 pixels.

    python tools/classify.py --config-file configs/backbones/dat_base.py \\
        --input IMAGE --weights WEIGHTS

Quoted from the authors: 84.03 % top-1, 96.69 % top-5, 88 M parameters, 15.8 GFLOPs.
Here 87,881,632 parameters and 15.788 GFLOPs at 224x224.
"""

from ..common.models.classifier import center_square, dat_classifier
from ..common.train import train

model = dat_classifier("dat_base")
preprocessing = center_square(224)
