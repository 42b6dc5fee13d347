"""DAT++-B for ImageNet-1k at 384x384 pixels.

    python tools/classify.py --config-file configs/backbones/dat_plus_plus_base_384.py \\
        --input IMAGE --weights WEIGHTS

Quoted from the authors: 85.9 % top-1, 93 M parameters, 49.7 GFLOPs.
Here 93,690,640 parameters and 49.734 GFLOPs at 384x384.

The model is that of 224 pixels: its tables are sampled at any size.
"""

from ..common.models.classifier import center_square, dat_classifier
from ..common.train import train

model = dat_classifier("dat_plus_plus_base_384")
preprocessing = center_square(384)
