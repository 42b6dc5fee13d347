"""SMCA-DETR as LazyConfigs: DETR whose decoder looks around a predicted centre.

`smca` has one level, `smca_multi_scale` is the model of the paper with attention inside and across
three levels, `smca_conv` the later released one with a convolutional encoder over four levels.
"""

from detectron2.config import LazyCall as L

from efficient_detr.modeling.attention import DenseEncoderAttention
from efficient_detr.modeling.attention.gaussian_scale import AxisScale
from efficient_detr.modeling.attention.intra_scale import IntraScaleAttention
from efficient_detr.modeling.attention.spatially_modulated import (
    CenterPrediction,
    ScaleSelectiveModulatedAttention,
    SpatiallyModulatedAttention,
)
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.pyramid_encoder import (
    PyramidEncoder,
    PyramidEncoderLayer,
    SeparateExchange,
    SharedExchange,
)
from efficient_detr.modeling.tokenizer import LevelFeatureTokenizer
from efficient_detr.postprocessing import SigmoidTopK

from .backbones import deformable_resnet50, detr_resnet50
from .detr import detr
from .parts import focal_set_loss

INTRA, MULTI = IntraScaleAttention, DenseEncoderAttention


def modulate(decoder, attention, scale, *, num_levels=1, **arguments):
    """Give all layers of a decoder a modulated attention; only the first predicts centres.

    `attention` and `scale` are classes, `arguments` those of the attention.
    """
    for index, layer in enumerate(decoder.layers):
        dense = layer.cross_attention
        layer.cross_attention = L(attention)(
            channels=dense.channels,
            num_heads=dense.num_heads,
            dropout=dense.dropout,
            scale=L(scale)(
                channels=dense.channels, num_heads=dense.num_heads, num_levels=num_levels
            ),
            center_prediction=L(CenterPrediction)(channels=dense.channels) if not index else None,
            **arguments,
        )


def classify_by_sigmoid(model):
    """Replace DETR's softmax with a no-object class by independent classes with focal loss."""
    detector = model.detector
    for head in detector.decoder.heads:
        head.background_classes = 0
        head.prior_probability = 0.01
    model.losses = [focal_set_loss(class_weight=2.0)]
    model.postprocessor = L(SigmoidTopK)(num_detections=detector.queries.num_queries)
    return model


def use_levels(detector, num_levels):
    """Turn the neck and the tokens of DETR into those of several levels."""
    detector.neck.num_levels = num_levels
    detector.tokenizer = L(LevelFeatureTokenizer)(
        position_embedding=detector.tokenizer.position_embedding,
        channels=detector.neck.channels,
        num_levels=num_levels,
        # The level beyond the backbone takes its padding from the level before.
        chained_levels=1,
    )


def smca(
    *, backbone=detr_resnet50, num_queries=300, stride=32, scale=AxisScale, beta=8.0, **detr_sizes
):
    """The single-scale model. `scale` is a class of gaussian_scale.py, `stride` pixels a cell."""
    model = detr(backbone=backbone, num_queries=num_queries, **detr_sizes)
    modulate(model.detector.decoder, SpatiallyModulatedAttention, scale, stride=stride, beta=beta)
    return classify_by_sigmoid(model)


def smca_multi_scale(
    *,
    backbone=deformable_resnet50,
    in_features=("res4", "res5"),
    in_channels=(1024, 2048),
    channels=256,
    hidden_channels=1024,
    num_queries=300,
    encoder_attentions=(INTRA, INTRA, MULTI, INTRA, INTRA),
    strides=(16, 32, 64),
    distance_factors=(0.5, 1.0, 2.0),
    scale=AxisScale,
    beta=8.0,
    **detr_sizes,
):
    """The paper's multi-scale model: a level for each backbone map and one more.

    `encoder_attentions` has the attention class of each encoder layer.
    """
    model = detr(
        backbone=backbone,
        in_features=in_features,
        in_channels=in_channels,
        channels=channels,
        hidden_channels=hidden_channels,
        num_queries=num_queries,
        encoder_layers=len(encoder_attentions),
        **detr_sizes,
    )
    use_levels(model.detector, len(strides))
    for layer, attention in zip(model.detector.encoder.layers, encoder_attentions, strict=True):
        layer.attention._target_ = attention
    modulate(
        model.detector.decoder,
        ScaleSelectiveModulatedAttention,
        scale,
        num_levels=len(strides),
        strides=list(strides),
        distance_factors=list(distance_factors),
        beta=beta,
    )
    return classify_by_sigmoid(model)


def smca_conv(
    *,
    backbone=deformable_resnet50,
    in_features=("res3", "res4", "res5"),
    in_channels=(512, 1024, 2048),
    channels=256,
    hidden_channels=1024,
    encoder_layers=6,
    dropout=0.1,
    kernel_size=7,
    shared=True,
    strides=(16, 16, 32, 64),
    distance_factors=(0.5, 0.5, 1.0, 2.0),
    **multi_scale_sizes,
):
    """The released multi-scale model, whose encoder halves the first level.

    `shared` says whether all pairs of levels exchange maps through the same convolutions. `strides`
    are those of the memory, after the encoder.
    """
    model = smca_multi_scale(
        backbone=backbone,
        in_features=in_features,
        in_channels=in_channels,
        channels=channels,
        hidden_channels=hidden_channels,
        dropout=dropout,
        encoder_attentions=(),
        strides=strides,
        distance_factors=distance_factors,
        **multi_scale_sizes,
    )
    convolutions = dict(channels=channels, num_levels=len(strides), kernel_size=kernel_size)
    model.detector.encoder = L(PyramidEncoder)(
        layers=[
            L(PyramidEncoderLayer)(
                exchange=L(SharedExchange if shared else SeparateExchange)(**convolutions),
                feedforward=L(FeedForward)(
                    channels=channels, hidden_channels=hidden_channels, dropout=dropout
                ),
                dropout=dropout,
                **convolutions,
            )
            for _ in range(encoder_layers)
        ],
        channels=channels,
        num_levels=len(strides),
    )
    return model


model = smca()
