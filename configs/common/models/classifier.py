"""Backbones with the linear head of their ImageNet training, as LazyConfigs."""

from detectron2.config import LazyCall as L

from efficient_detr.data.center_square import CenterSquare
from efficient_detr.modeling.backbones.dat_variants import VARIANTS, dat_backbone
from efficient_detr.modeling.classifier import ImageClassifier

from ..data.constants import constants


def image_classifier(backbone, channels: int, num_classes: int = 1000):
    """A classifier on the last map of a backbone, "p3" with `channels` channels."""
    return L(ImageClassifier)(
        backbone=backbone,
        feature="p3",
        channels=channels,
        num_classes=num_classes,
        pixel_mean=constants.imagenet_rgb256_mean,
        pixel_std=constants.imagenet_rgb256_std,
        input_format="RGB",
    )


def dat_classifier(variant: str):
    """The classifier of a published DAT or DAT++; `variant` is a name of `VARIANTS`."""
    return image_classifier(
        dat_backbone(variant, out_features=["p3"]), VARIANTS[variant].stages[-1].channels
    )


def center_square(image_size: int):
    """The square of `image_size` pixels in the middle of a picture."""
    return L(CenterSquare)(image_size=image_size)
