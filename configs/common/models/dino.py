"""DINO as a LazyConfig: every size is an argument, every part a node that a config can replace."""

from detectron2.config import LazyCall as L
from torch import nn

from efficient_detr.modeling.attention import (
    DeformableDecoderAttention,
    DeformableEncoderAttention,
)
from efficient_detr.modeling.decoder import BoxQueryPosition, TransformerDecoder
from efficient_detr.modeling.detector import Detector
from efficient_detr.modeling.encoder import TransformerEncoder
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.position import SinePositionEmbedding
from efficient_detr.modeling.queries import (
    ContrastiveDenoising,
    LearnedContentQueries,
    ProposalHead,
)
from efficient_detr.modeling.refinement import LookForwardTwice
from efficient_detr.modeling.tokenizer import LevelFeatureTokenizer
from efficient_detr.postprocessing import SigmoidTopK

from .backbones import resnet50
from .parts import (
    channel_mapper,
    decoder_layer,
    detection_model,
    encoder_layer,
    focal_set_loss,
)


def dino(
    *,
    backbone=resnet50,
    in_features=("res3", "res4", "res5"),
    in_channels=(512, 1024, 2048),
    num_classes=80,
    channels=256,
    num_heads=8,
    num_points=4,
    num_levels=4,
    hidden_channels=2048,
    encoder_layers=6,
    decoder_layers=6,
    num_queries=900,
    num_groups=32,
    temperature=10000,
    position_offset=-0.5,
    num_denoising_queries=100,
    num_detections=300,
):
    """The whole model. `model.num_classes` is the only place to set the number of classes."""
    attention = dict(
        channels=channels, num_heads=num_heads, num_levels=num_levels, num_points=num_points
    )
    layer = dict(channels=channels, hidden_channels=hidden_channels)
    return detection_model(
        num_classes=num_classes,
        detector=L(Detector)(
            backbone=backbone,
            neck=channel_mapper(
                in_features=in_features,
                in_channels=in_channels,
                channels=channels,
                num_levels=num_levels,
                num_groups=num_groups,
            ),
            tokenizer=L(LevelFeatureTokenizer)(
                position_embedding=L(SinePositionEmbedding)(
                    channels=channels, temperature=temperature, offset=position_offset
                ),
                channels=channels,
                num_levels=num_levels,
            ),
            selection=None,
            encoder=L(TransformerEncoder)(
                layers=[
                    encoder_layer(L(DeformableEncoderAttention)(**attention), **layer)
                    for _ in range(encoder_layers)
                ],
            ),
            proposals=L(ProposalHead)(
                channels=channels,
                head=L(PredictionHead)(channels=channels, num_classes="${....num_classes}"),
            ),
            queries=L(LearnedContentQueries)(num_queries=num_queries, channels=channels),
            denoising=L(ContrastiveDenoising)(
                num_classes="${...num_classes}",
                channels=channels,
                num_queries=num_denoising_queries,
            ),
            decoder=L(TransformerDecoder)(
                layers=[
                    decoder_layer(
                        L(DeformableDecoderAttention)(**attention), num_heads=num_heads, **layer
                    )
                    for _ in range(decoder_layers)
                ],
                heads=[
                    L(PredictionHead)(channels=channels, num_classes="${.....num_classes}")
                    for _ in range(decoder_layers)
                ],
                query_position=L(BoxQueryPosition)(channels=channels),
                refinement=L(LookForwardTwice)(),
                norm=L(nn.LayerNorm)(normalized_shape=channels),
            ),
        ),
        losses=[focal_set_loss(class_weight=1.0)],
        postprocessor=L(SigmoidTopK)(num_detections=num_detections),
    )


model = dino()
