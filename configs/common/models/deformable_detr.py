"""Deformable DETR as LazyConfigs: plain, with box refinement, and with two stages besides.

The three share every size; each function is the one before with some parts replaced.
"""

from detectron2.config import LazyCall as L

from efficient_detr.modeling.attention import (
    DeformableDecoderAttention,
    DeformableEncoderAttention,
)
from efficient_detr.modeling.decoder import StoredQueryPosition, TransformerDecoder
from efficient_detr.modeling.detector import Detector
from efficient_detr.modeling.encoder import TransformerEncoder
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.position import SinePositionEmbedding
from efficient_detr.modeling.queries import (
    BoxEmbeddedQueries,
    FirstClassScore,
    ProposalHead,
    ReferencePointQueries,
)
from efficient_detr.modeling.refinement import FixedReferences, IterativeRefinement
from efficient_detr.modeling.tokenizer import LevelFeatureTokenizer
from efficient_detr.postprocessing import SigmoidTopK

from .backbones import deformable_resnet50
from .parts import (
    channel_mapper,
    decoder_layer,
    detection_model,
    encoder_layer,
    focal_set_loss,
)

# Boxes start small: sigmoid(-2) = 0.12 of the image's sides.
SMALL_BOXES = (0.0, 0.0, -2.0, -2.0)
UNCHANGED_BOXES = (0.0, 0.0, 0.0, 0.0)


def decoder_head(channels, box_bias):
    """A prediction head inside `decoder.heads`."""
    return L(PredictionHead)(
        channels=channels, num_classes="${.....num_classes}", box_bias=list(box_bias)
    )


def deformable_detr(
    *,
    backbone=deformable_resnet50,
    in_features=("res3", "res4", "res5"),
    in_channels=(512, 1024, 2048),
    num_classes=80,
    channels=256,
    num_heads=8,
    num_levels=4,
    encoder_points=4,
    decoder_points=4,
    hidden_channels=1024,
    encoder_layers=6,
    decoder_layers=6,
    num_queries=300,
    num_groups=32,
    dropout=0.1,
    num_detections=100,
):
    """The whole model. `model.num_classes` is the only place to set the number of classes."""
    # Deformable attention itself has no dropout.
    attention = dict(channels=channels, num_heads=num_heads, num_levels=num_levels)
    layer = dict(channels=channels, hidden_channels=hidden_channels, dropout=dropout)
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
                position_embedding=L(SinePositionEmbedding)(channels=channels, offset=-0.5),
                channels=channels,
                num_levels=num_levels,
            ),
            encoder=L(TransformerEncoder)(
                layers=[
                    encoder_layer(
                        L(DeformableEncoderAttention)(**attention, num_points=encoder_points),
                        **layer,
                    )
                    for _ in range(encoder_layers)
                ]
            ),
            queries=L(ReferencePointQueries)(num_queries=num_queries, channels=channels),
            decoder=L(TransformerDecoder)(
                layers=[
                    decoder_layer(
                        L(DeformableDecoderAttention)(**attention, num_points=decoder_points),
                        num_heads=num_heads,
                        **layer,
                    )
                    for _ in range(decoder_layers)
                ],
                # One head for all layers.
                heads=[decoder_head(channels, SMALL_BOXES)],
                query_position=L(StoredQueryPosition)(),
                refinement=L(FixedReferences)(),
            ),
        ),
        losses=[focal_set_loss(class_weight=2.0)],
        postprocessor=L(SigmoidTopK)(num_detections=num_detections),
    )


def deformable_detr_refine(**sizes):
    """`deformable_detr` whose layers correct the boxes of the layer before, each with its head."""
    model = deformable_detr(**sizes)
    channels = model.detector.neck.channels
    decoder = model.detector.decoder
    decoder.refinement = L(IterativeRefinement)()
    decoder.heads = [
        decoder_head(channels, UNCHANGED_BOXES if index else SMALL_BOXES)
        for index in range(len(decoder.layers))
    ]
    return model


def deformable_detr_two_stage(**sizes):
    """`deformable_detr_refine` whose queries start at the encoder's best proposals."""
    model = deformable_detr_refine(**sizes)
    detector = model.detector
    channels = detector.neck.channels
    for head in detector.decoder.heads:
        head.box_bias = list(UNCHANGED_BOXES)
    detector.proposals = L(ProposalHead)(
        channels=channels,
        head=L(PredictionHead)(channels=channels, num_classes="${....num_classes}"),
    )
    detector.queries = L(BoxEmbeddedQueries)(
        num_queries=detector.queries.num_queries, channels=channels, score=L(FirstClassScore)()
    )
    return model


model = deformable_detr()
