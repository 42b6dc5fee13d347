"""Sparse DETR as a LazyConfig: two-stage Deformable DETR whose encoder updates few tokens."""

from detectron2.config import LazyCall as L

from efficient_detr.losses import TokenAttentionLoss
from efficient_detr.modeling.encoder import CarriedTokens
from efficient_detr.modeling.encoder_heads import EncoderLayerHeads
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.queries import BestClassScore, MemoryContentQueries
from efficient_detr.modeling.selection import ForegroundScoreHead, SalientTokenSelector

from .deformable_detr import deformable_detr_two_stage


def sparse_detr(*, keep_ratio=0.3, **sizes):
    """The whole model, as published, with every efficient option of the authors' code.

    `keep_ratio` is rho, the part of the tokens that the encoder updates; `sizes` are those of
    `deformable_detr`.
    """
    model = deformable_detr_two_stage(**sizes)
    detector = model.detector
    channels, num_layers = detector.neck.channels, len(detector.encoder.layers)
    detector.selection = L(SalientTokenSelector)(
        score_head=L(ForegroundScoreHead)(channels=channels),
        num_layers=num_layers,
        keep_ratio=keep_ratio,
    )
    detector.encoder.token_source = L(CarriedTokens)()
    detector.encoder_heads = L(EncoderLayerHeads)(
        heads=[
            L(PredictionHead)(channels=channels, num_classes="${.....num_classes}")
            for _ in range(num_layers - 1)
        ]
    )
    detector.queries = L(MemoryContentQueries)(
        num_queries=detector.queries.num_queries, channels=channels, score=L(BestClassScore)()
    )
    detector.decoder.map_token_attention = True
    model.losses.append(L(TokenAttentionLoss)())
    return model


model = sparse_detr()
