"""Backbones as LazyConfigs."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem


def resnet(depth: int, out_features: list[str]):
    """Detectron2's ResNet with frozen batch norm, stride in the 3x3 convolution, frozen stem.

    `depth` is 50, 101 or 152; `out_features` are among "res2" to "res5" with 256, 512, 1024 and
    2048 channels at strides 4, 8, 16 and 32.
    """
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=depth, stride_in_1x1=False, norm="FrozenBN"),
        out_features=out_features,
        freeze_at=1,
    )


resnet50 = resnet(50, ["res3", "res4", "res5"])
resnet101 = resnet(101, ["res3", "res4", "res5"])
