"""Swin-T for ImageNet-1k at 224x224 pixels.

    python tools/classify.py --config-file configs/backbones/swin_tiny.py \\
        --input IMAGE --weights WEIGHTS

Quoted from the authors: 81.3 % top-1, 29 M parameters, 4.5 GFLOPs.
Here 28,288,354 parameters and 4.509 GFLOPs at 224x224.
"""

from ..common.models.backbones import swin
from ..common.models.classifier import center_square, image_classifier
from ..common.train import train

# No drop path: nothing is trained here, and Detectron2's own Swin needs timm for it.
model = image_classifier(swin("tiny", out_indices=(3,), drop_path_rate=0.0), channels=768)
preprocessing = center_square(224)
