"""Backbones as LazyConfigs."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet, SwinTransformer
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


# Channels at stride 4, blocks at stride 16, cells of a window's side and pixels of an image's side
# in the ImageNet training, rate of drop path in the detectors of detrex (DINO and Focus-DETR).
SWIN_SIZES = {
    "tiny": (96, 6, 7, 224, 0.1),
    "small": (96, 18, 7, 224, 0.2),
    "base": (128, 18, 7, 224, 0.2),
    "base_384": (128, 18, 12, 384, 0.2),
    "large_384": (192, 18, 12, 384, 0.2),
}


def swin(
    size: str,
    *,
    out_indices: tuple[int, ...] = (1, 2, 3),
    drop_path_rate: float | None = None,
    frozen_stages: int = -1,
):
    """Detectron2's Swin Transformer: maps "p0" to "p3" at strides 4, 8, 16 and 32.

    `size` is a key of `SWIN_SIZES`; `out_indices` are the maps that are returned, each with twice
    the channels of the one before. `drop_path_rate` None is that of the table; Detectron2's own
    Swin needs timm for one above 0. `frozen_stages` 0 freezes the patch embedding, 2 also the
    blocks at stride 4.
    """
    channels, depth, window_size, image_size, table_rate = SWIN_SIZES[size]
    return L(SwinTransformer)(
        pretrain_img_size=image_size,
        embed_dim=channels,
        depths=[2, 2, depth, 2],
        # 32 channels a head.
        num_heads=[channels // 32 * 2**stage for stage in range(4)],
        window_size=window_size,
        drop_path_rate=table_rate if drop_path_rate is None else drop_path_rate,
        out_indices=list(out_indices),
        frozen_stages=frozen_stages,
        # Recompute blocks in the backward pass, for less memory.
        use_checkpoint=False,
    )


resnet50 = resnet(50, ["res3", "res4", "res5"])
resnet101 = resnet(101, ["res3", "res4", "res5"])
# DETR, Deformable DETR, SMCA and ACT keep the first stage as ImageNet left it.
detr_resnet50 = resnet(50, ["res5"], freeze_at=2)
deformable_resnet50 = resnet(50, ["res3", "res4", "res5"], freeze_at=2)
