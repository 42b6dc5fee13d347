"""Nodes that the models' configs share; in what they differ is an argument."""

from detectron2.config import LazyCall as L

from efficient_detr.losses import FocalClassCost, FocalClassLoss, HungarianMatcher, SetLoss
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention import SelfAttention
from efficient_detr.modeling.decoder import DecoderLayer
from efficient_detr.modeling.encoder import EncoderLayer
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.neck import ChannelMapper

from ..data.constants import constants


def detection_model(*, num_classes, detector, losses, postprocessor):
    """The whole model, for images normalised as ImageNet's backbones expect."""
    return L(EfficientDETR)(
        num_classes=num_classes,
        detector=detector,
        losses=losses,
        postprocessor=postprocessor,
        pixel_mean=constants.imagenet_rgb256_mean,
        pixel_std=constants.imagenet_rgb256_std,
    )


def channel_mapper(*, in_features, in_channels, channels, num_levels, num_groups):
    """The neck; `num_groups` None has no norm."""
    return L(ChannelMapper)(
        in_features=list(in_features),
        in_channels=list(in_channels),
        channels=channels,
        num_levels=num_levels,
        num_groups=num_groups,
    )


def encoder_layer(attention, *, channels, hidden_channels, dropout=0.0):
    """An encoder layer around an attention node."""
    return L(EncoderLayer)(
        attention=attention,
        feedforward=L(FeedForward)(
            channels=channels, hidden_channels=hidden_channels, dropout=dropout
        ),
        channels=channels,
        dropout=dropout,
    )


def decoder_layer(cross_attention, *, channels, num_heads, hidden_channels, dropout=0.0):
    """A decoder layer with dense self-attention around a cross-attention node."""
    return L(DecoderLayer)(
        self_attention=L(SelfAttention)(channels=channels, num_heads=num_heads, dropout=dropout),
        cross_attention=cross_attention,
        feedforward=L(FeedForward)(
            channels=channels, hidden_channels=hidden_channels, dropout=dropout
        ),
        channels=channels,
        dropout=dropout,
    )


def focal_set_loss(*, class_weight):
    """Set loss with focal classification of this weight, which counts 2 in the matching."""
    return L(SetLoss)(
        matcher=L(HungarianMatcher)(class_cost=L(FocalClassCost)(), class_weight=2.0),
        class_loss=L(FocalClassLoss)(),
        class_weight=class_weight,
    )
