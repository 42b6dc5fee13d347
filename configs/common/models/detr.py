"""DETR as a LazyConfig: every size is an argument, every part a node that a config can replace."""

from detectron2.config import LazyCall as L
from torch import nn

from efficient_detr.losses import HungarianMatcher, SetLoss, SoftmaxClassCost, SoftmaxClassLoss
from efficient_detr.modeling.attention import DenseDecoderAttention, DenseEncoderAttention
from efficient_detr.modeling.decoder import (
    PreNormDecoderLayer,
    StoredQueryPosition,
    TransformerDecoder,
)
from efficient_detr.modeling.detector import Detector
from efficient_detr.modeling.encoder import PreNormEncoderLayer, TransformerEncoder
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.position import SinePositionEmbedding
from efficient_detr.modeling.queries import LearnedQueries
from efficient_detr.modeling.refinement import FixedReferences
from efficient_detr.modeling.tokenizer import FeatureTokenizer
from efficient_detr.postprocessing import SoftmaxBestClass

from .backbones import detr_resnet50
from .parts import channel_mapper, decoder_layer, detection_model, encoder_layer


def softmax_set_loss():
    """DETR's loss: cross-entropy in which unmatched queries count a tenth."""
    return L(SetLoss)(
        matcher=L(HungarianMatcher)(class_cost=L(SoftmaxClassCost)(), class_weight=1.0),
        class_loss=L(SoftmaxClassLoss)(no_object_weight=0.1),
        class_weight=1.0,
    )


def detr(
    *,
    backbone=detr_resnet50,
    in_features=("res5",),
    in_channels=(2048,),
    num_classes=80,
    channels=256,
    num_heads=8,
    hidden_channels=2048,
    encoder_layers=6,
    decoder_layers=6,
    num_queries=100,
    dropout=0.1,
):
    """The whole model. `model.num_classes` is the only place to set the number of classes."""
    attention = dict(channels=channels, num_heads=num_heads, dropout=dropout)
    layer = dict(channels=channels, hidden_channels=hidden_channels, dropout=dropout)
    return detection_model(
        num_classes=num_classes,
        detector=L(Detector)(
            backbone=backbone,
            neck=channel_mapper(
                in_features=in_features,
                in_channels=in_channels,
                channels=channels,
                num_levels=1,
                num_groups=None,
            ),
            tokenizer=L(FeatureTokenizer)(
                position_embedding=L(SinePositionEmbedding)(channels=channels, offset=0.0),
                num_levels=1,
            ),
            encoder=L(TransformerEncoder)(
                layers=[
                    encoder_layer(L(DenseEncoderAttention)(**attention), **layer)
                    for _ in range(encoder_layers)
                ]
            ),
            queries=L(LearnedQueries)(num_queries=num_queries, channels=channels),
            decoder=L(TransformerDecoder)(
                layers=[
                    decoder_layer(
                        L(DenseDecoderAttention)(**attention), num_heads=num_heads, **layer
                    )
                    for _ in range(decoder_layers)
                ],
                # One head for all layers.
                heads=[
                    L(PredictionHead)(
                        channels=channels,
                        num_classes="${.....num_classes}",
                        background_classes=1,
                        prior_probability=None,
                        box_bias=None,
                    )
                ],
                query_position=L(StoredQueryPosition)(),
                refinement=L(FixedReferences)(),
                norm=L(nn.LayerNorm)(normalized_shape=channels),
            ),
        ),
        losses=[softmax_set_loss()],
        postprocessor=L(SoftmaxBestClass)(),
    )


def pre_norm(model):
    """Turn a post-norm DETR into the pre-norm one, which also has a norm after the encoder."""
    detector = model.detector
    for layer in detector.encoder.layers:
        layer._target_ = PreNormEncoderLayer
    for layer in detector.decoder.layers:
        layer._target_ = PreNormDecoderLayer
    detector.encoder.norm = L(nn.LayerNorm)(normalized_shape=detector.neck.channels)
    return model


model = detr()
