"""DAT-B for ImageNet-1k at 384x384 pixels.

    python tools/classify.py --config-file configs/backbones/dat_base_384.py \\
        --input IMAGE --weights WEIGHTS

Quoted from the authors: 84.75 % top-1, 96.98 % top-5, 88 M parameters, 49.8 GFLOPs.
Here 88,178,272 parameters and 49.772 GFLOPs at 384x384.

Windows and position tables are larger than at 224 pixels, so the weights of the smaller model need
their tables resized, which loading does.
"""

from ..common.models.classifier import center_square, dat_classifier
from ..common.train import train

model = dat_classifier("dat_base_384")
preprocessing = center_square(384)
