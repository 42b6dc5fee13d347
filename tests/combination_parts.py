"""Config nodes of the tiny detectors of `tests.combinations`, put together from classes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from detectron2.config import LazyCall as L
from torch import nn

from efficient_detr.losses import (
    FocalClassCost,
    FocalClassLoss,
    ForegroundLoss,
    HungarianMatcher,
    SetLoss,
    SideDistanceForeground,
)
from efficient_detr.losses.token_attention import TokenAttentionLoss
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention import (
    DeformableDecoderAttention,
    DeformableEncoderAttention,
    DenseDecoderAttention,
    ObjectSelfAttention,
    SelfAttention,
)
from efficient_detr.modeling.attention.clustered import (
    ClusteredEncoderAttention,
    ClusteredSelfAttention,
    TokenClustering,
)
from efficient_detr.modeling.attention.gaussian_scale import AxisScale
from efficient_detr.modeling.attention.spatially_modulated import (
    CenterPrediction,
    SpatiallyModulatedAttention,
)
from efficient_detr.modeling.decoder import (
    BoxQueryPosition,
    DecoderLayer,
    PreNormDecoderLayer,
    StoredQueryPosition,
    TransformerDecoder,
)
from efficient_detr.modeling.detector import Detector
from efficient_detr.modeling.encoder import (
    DualAttentionEncoderLayer,
    EncoderLayer,
    PreNormEncoderLayer,
    TransformerEncoder,
)
from efficient_detr.modeling.encoder_heads import EncoderLayerHeads
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.neck import ChannelMapper
from efficient_detr.modeling.position import SinePositionEmbedding
from efficient_detr.modeling.pyramid_encoder import (
    PyramidEncoder,
    PyramidEncoderLayer,
    SeparateExchange,
)
from efficient_detr.modeling.queries import (
    BestClassScore,
    BoxEmbeddedQueries,
    ContrastiveDenoising,
    FirstClassScore,
    MemoryContentQueries,
    ProposalHead,
)
from efficient_detr.modeling.queries.interface import QuerySource
from efficient_detr.modeling.refinement import (
    FixedReferences,
)
from efficient_detr.modeling.selection import (
    ForegroundScoreHead,
    LogitProductScore,
    SalientTokenSelector,
)
from efficient_detr.modeling.tokenizer import LevelFeatureTokenizer
from efficient_detr.postprocessing import SigmoidTopK
from tests.tiny_models import PatchBackbone

CHANNELS, NUM_HEADS, HIDDEN, NUM_POINTS = 16, 2, 24, 2
NUM_CLASSES, NUM_QUERIES, NUM_LAYERS = 5, 6, 2
WIDTHS = {"res3": 8, "res4": 12, "res5": 16}
STRIDES = {"res3": 8, "res4": 16, "res5": 32}
# Backbone maps of a memory with one level and of one with three. Without the neck's group norm and
# coarser levels, nothing before the tokens mixes image and padding.
FEATURES = {1: ["res5"], 3: ["res3", "res4", "res5"]}


@dataclass(frozen=True)
class EncoderKind:
    """A row of the table.

    Attributes:
        title: how the document calls it.
        attention: class of the attention, or `PyramidEncoder`.
        selection: class of the token selection, or None.
        layer: class of the layers.
    """

    title: str
    attention: type
    selection: type | None = None
    layer: type = EncoderLayer


@dataclass(frozen=True)
class DecoderKind:
    """A column of the table.

    Attributes:
        title: how the document calls it.
        attention: class of the cross-attention.
        queries: class of the query source.
        refinement: class of the rule by which boxes follow from corrections.
        self_attention: class of the self-attention.
        layer: class of the layers.
        denoising: whether there are denoising queries in training.
    """

    title: str
    attention: type
    queries: type[QuerySource]
    refinement: type = FixedReferences
    self_attention: type = SelfAttention
    layer: type = DecoderLayer
    denoising: bool = False


@dataclass(frozen=True)
class Combination:
    """An encoder, a decoder and the number of levels of the memory (1 or 3)."""

    encoder: EncoderKind
    decoder: DecoderKind
    num_levels: int

    def __str__(self) -> str:
        return f"{self.encoder.title} / {self.decoder.title} / {self.num_levels}"


def config(combination: Combination) -> Any:
    """The model as config nodes."""
    encoder, decoder, levels = combination.encoder, combination.decoder, combination.num_levels
    features = FEATURES[levels]
    model = L(EfficientDETR)(
        detector=L(Detector)(
            backbone=L(PatchBackbone)(widths=list(WIDTHS.values())),
            neck=L(ChannelMapper)(
                in_features=features,
                in_channels=[WIDTHS[name] for name in features],
                channels=CHANNELS,
                num_levels=levels,
                num_groups=None,
            ),
            tokenizer=L(LevelFeatureTokenizer)(
                position_embedding=L(SinePositionEmbedding)(channels=CHANNELS, offset=-0.5),
                channels=CHANNELS,
                num_levels=levels,
            ),
        ),
        losses=[
            L(SetLoss)(
                matcher=L(HungarianMatcher)(class_cost=L(FocalClassCost)()),
                class_loss=L(FocalClassLoss)(),
            )
        ],
        postprocessor=L(SigmoidTopK)(num_detections=NUM_QUERIES),
        num_classes=NUM_CLASSES,
    )
    detector = model.detector
    detector.encoder = encoder_config(encoder, levels)
    detector.queries = queries_config(decoder.queries)
    detector.decoder = decoder_config(decoder, memory_strides(combination))
    if decoder.queries.needs_proposals or encoder.selection is not None:
        head = head_config() if decoder.queries.needs_proposals else None
        detector.proposals = L(ProposalHead)(channels=CHANNELS, head=head)
    if decoder.denoising:
        detector.denoising = L(ContrastiveDenoising)(
            num_classes=NUM_CLASSES, channels=CHANNELS, num_queries=6
        )
    if encoder.selection is not None:
        detector.selection = selection_config(encoder.selection, levels)
        supervise_selection(model, combination)
    return model


def supervise_selection(model: Any, combination: Combination) -> None:
    """Add the loss of the token scores, and the heads of Sparse DETR's encoder.

    That of Sparse DETR reads from deformable cross-attention where it looks; other decoders leave
    the scores to the loss of Focus-DETR.
    """
    salient = combination.encoder.selection is SalientTokenSelector
    if salient:
        heads = [head_config() for _ in range(NUM_LAYERS - 1)]
        model.detector.encoder_heads = L(EncoderLayerHeads)(heads=heads)
    if salient and combination.decoder.attention is DeformableDecoderAttention:
        model.detector.decoder.map_token_attention = True
        model.losses.append(L(TokenAttentionLoss)())
        return
    strides = [STRIDES[name] for name in FEATURES[combination.num_levels]]
    ends = [2 * stride for stride in strides[:-1]]
    labels = L(SideDistanceForeground)(strides=strides, ends=ends)
    model.losses.append(L(ForegroundLoss)(labels=labels))


@functools.cache
def encoder_config(encoder: EncoderKind, num_levels: int) -> Any:
    """The encoder's node."""
    if encoder.attention is PyramidEncoder:
        return pyramid_config(num_levels)
    layers = [encoder_layer_config(encoder, num_levels, index) for index in range(NUM_LAYERS)]
    score = L(LogitProductScore)() if encoder.layer is DualAttentionEncoderLayer else None
    norm = norm_config() if encoder.layer is PreNormEncoderLayer else None
    return L(TransformerEncoder)(layers=layers, norm=norm, object_score=score)


def encoder_layer_config(encoder: EncoderKind, num_levels: int, index: int) -> Any:
    """A layer's node."""
    layer = L(encoder.layer)(
        attention=encoder_attention_config(encoder.attention, num_levels, index),
        feedforward=feedforward_config(),
        channels=CHANNELS,
    )
    if encoder.layer is DualAttentionEncoderLayer:
        layer.object_attention = L(ObjectSelfAttention)(
            attention=L(SelfAttention)(channels=CHANNELS, num_heads=NUM_HEADS),
            channels=CHANNELS,
            num_tokens=4,
        )
    return layer


def encoder_attention_config(attention: type, num_levels: int, index: int) -> Any:
    """The node of an encoder attention."""
    if attention is DeformableEncoderAttention:
        return L(attention)(**attention_sizes(), num_levels=num_levels, num_points=NUM_POINTS)
    if attention is ClusteredEncoderAttention:
        return L(attention)(**attention_sizes(), **clustering_config(index))
    return L(attention)(**attention_sizes())


def pyramid_config(num_levels: int) -> Any:
    """The node of the convolutional encoder."""
    sizes = dict(channels=CHANNELS, num_levels=num_levels)
    layers = [
        L(PyramidEncoderLayer)(
            exchange=L(SeparateExchange)(**sizes, kernel_size=3),
            feedforward=feedforward_config(),
            **sizes,
            kernel_size=3,
        )
        for _ in range(NUM_LAYERS)
    ]
    return L(PyramidEncoder)(layers=layers, **sizes)


def selection_config(selection: type, num_levels: int) -> Any:
    """The node of a token selection."""
    score_head = L(ForegroundScoreHead)(channels=CHANNELS)
    if selection is SalientTokenSelector:
        return L(selection)(score_head=score_head, num_layers=NUM_LAYERS, keep_ratio=0.5)
    ratios = [1.0, 0.5]
    return L(selection)(score_head=score_head, num_levels=num_levels, layer_keep_ratios=ratios)


def queries_config(queries: type[QuerySource]) -> Any:
    """The node of a query source."""
    scores: dict[type, dict[str, Any]] = {
        BoxEmbeddedQueries: dict(score=L(FirstClassScore)()),
        MemoryContentQueries: dict(score=L(BestClassScore)()),
    }
    return L(queries)(num_queries=NUM_QUERIES, channels=CHANNELS, **scores.get(queries, {}))


def memory_strides(combination: Combination) -> tuple[int, ...]:
    """Pixels a cell of each level of the memory; the pyramid halves its finest level."""
    strides = [STRIDES[name] for name in FEATURES[combination.num_levels]]
    if combination.encoder.attention is PyramidEncoder and len(strides) > 1:
        strides[0] = strides[1]
    return tuple(strides)


@functools.cache
def decoder_config(decoder: DecoderKind, strides: tuple[int, ...]) -> Any:
    """The decoder's node."""
    boxes_only = decoder.queries.gives_boxes and not decoder.queries.gives_positions
    return L(TransformerDecoder)(
        layers=[decoder_layer_config(decoder, strides, index) for index in range(NUM_LAYERS)],
        heads=[head_config() for _ in range(NUM_LAYERS)],
        query_position=L(BoxQueryPosition)(channels=CHANNELS)
        if boxes_only
        else L(StoredQueryPosition)(),
        refinement=L(decoder.refinement)(),
        norm=norm_config() if decoder.layer is PreNormDecoderLayer else None,
    )


def decoder_layer_config(decoder: DecoderKind, strides: tuple[int, ...], index: int) -> Any:
    """A layer's node."""
    clustered = decoder.self_attention is ClusteredSelfAttention
    return L(decoder.layer)(
        self_attention=L(decoder.self_attention)(
            **attention_sizes(), **(clustering_config(index) if clustered else {})
        ),
        cross_attention=cross_attention_config(decoder, strides, index),
        feedforward=feedforward_config(),
        channels=CHANNELS,
    )


def cross_attention_config(decoder: DecoderKind, strides: tuple[int, ...], index: int) -> Any:
    """The node of a cross-attention."""
    attention = decoder.attention
    if attention is DeformableDecoderAttention:
        return L(attention)(**attention_sizes(), num_levels=len(strides), num_points=NUM_POINTS)
    if attention is DenseDecoderAttention:
        return L(attention)(**attention_sizes())
    predicts = index == 0 and not decoder.queries.gives_references
    center = L(CenterPrediction)(channels=CHANNELS) if predicts else None
    single = attention is SpatiallyModulatedAttention
    levels = (
        dict(stride=strides[0])
        if single
        else dict(strides=list(strides), distance_factors=[0.5 * 2**i for i in range(len(strides))])
    )
    scale = L(AxisScale)(**attention_sizes(), num_levels=1 if single else len(strides))
    return L(attention)(**attention_sizes(), scale=scale, center_prediction=center, **levels)


def attention_sizes() -> dict[str, int]:
    """Sizes that all attentions share."""
    return dict(channels=CHANNELS, num_heads=NUM_HEADS)


def clustering_config(seed: int) -> dict[str, Any]:
    """Arguments that make an attention cluster, however few tokens there are."""
    clustering = L(TokenClustering)(
        head_channels=CHANNELS // NUM_HEADS, rounds=2, width=1.0, seed=seed
    )
    return dict(query_clustering=clustering, min_tokens=0, max_cluster_ratio=1.0)


def feedforward_config() -> Any:
    """The node of a position-wise network."""
    return L(FeedForward)(channels=CHANNELS, hidden_channels=HIDDEN)


def norm_config() -> Any:
    """The node of the norm after pre-norm layers."""
    return L(nn.LayerNorm)(normalized_shape=CHANNELS)


def head_config() -> Any:
    """The node of a prediction head."""
    return L(PredictionHead)(channels=CHANNELS, num_classes=NUM_CLASSES)
