"""Backbones as LazyConfigs."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem

from efficient_detr.modeling.backbones import dilated_resnet_stages


def resnet(depth: int, out_features: list[str], freeze_at: int = 1):
    """Detectron2's ResNet with frozen batch norm and stride in the 3x3 convolution.

    `depth` is 50, 101 or 152; `out_features` are among "res2" to "res5" with 256, 512, 1024 and
    2048 channels at strides 4, 8, 16 and 32. `freeze_at` 1 freezes the stem, 2 also res2.
    """
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=depth, stride_in_1x1=False, norm="FrozenBN"),
        out_features=list(out_features),
        freeze_at=freeze_at,
    )


def resnet_dc5(depth: int, freeze_at: int = 2):
    """`resnet` with a dilated last stage (DETR's "DC5"): "res5" has stride 16.

    A config with `resnet` becomes this one by
    `backbone.stages._target_=efficient_detr.modeling.backbones.dilated_resnet_stages`.
    """
    backbone = resnet(depth, ["res5"], freeze_at)
    backbone.stages._target_ = dilated_resnet_stages
    return backbone


resnet50 = resnet(50, ["res3", "res4", "res5"])
resnet101 = resnet(101, ["res3", "res4", "res5"])
# DETR, Deformable DETR, SMCA and ACT keep the first stage as ImageNet left it.
detr_resnet50 = resnet(50, ["res5"], freeze_at=2)
deformable_resnet50 = resnet(50, ["res3", "res4", "res5"], freeze_at=2)
