"""Parts that do not fit together are refused when the detector is built; both are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention import (
    DecoderAttention,
    DeformableDecoderAttention,
    DenseDecoderAttention,
    DenseEncoderAttention,
    EncoderAttention,
    SelfAttention,
)
from efficient_detr.modeling.attention.gaussian_scale import ConstantScale
from efficient_detr.modeling.attention.spatially_modulated import ScaleSelectiveModulatedAttention
from efficient_detr.modeling.decoder import (
    BoxQueryPosition,
    DecoderLayer,
    StoredQueryPosition,
    TransformerDecoder,
)
from efficient_detr.modeling.detector import Detector
from efficient_detr.modeling.encoder import EncoderLayer, TransformerEncoder
from efficient_detr.modeling.encoder_heads import EncoderLayerHeads
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.neck import ChannelMapper
from efficient_detr.modeling.position import SinePositionEmbedding
from efficient_detr.modeling.queries import (
    BoxEmbeddedQueries,
    ContrastiveDenoising,
    FirstClassScore,
    LearnedContentQueries,
    LearnedQueries,
    ProposalHead,
    ReferencePointQueries,
)
from efficient_detr.modeling.selection import ForegroundScoreHead, SalientTokenSelector
from efficient_detr.modeling.tokenizer import FeatureTokenizer
from efficient_detr.structures import EncoderOutput, FeatureTokens
from tests.tiny_models import PatchBackbone, padding_mask, targets_of, tiny_config

C = 8


def prediction_head() -> PredictionHead:
    return PredictionHead(channels=C, num_classes=3)


def proposal_head() -> ProposalHead:
    return ProposalHead(channels=C, head=prediction_head())


def token_transform() -> ProposalHead:
    """What a selection reads; without a head there are no proposals."""
    return ProposalHead(channels=C)


def selector(num_layers: int = 2) -> SalientTokenSelector:
    return SalientTokenSelector(score_head=ForegroundScoreHead(channels=C), num_layers=num_layers)


def encoder(attention: type[EncoderAttention] | None = None) -> TransformerEncoder:
    def layer() -> EncoderLayer:
        return EncoderLayer(
            attention=attention() if attention else DenseEncoderAttention(channels=C, num_heads=2),
            feedforward=FeedForward(channels=C, hidden_channels=12),
            channels=C,
        )

    return TransformerEncoder(layers=[layer(), layer()])


def decoder(
    cross_attention: DecoderAttention | None = None, *, boxes: bool = False
) -> TransformerDecoder:
    """One layer; with `boxes` its positions come from reference boxes."""
    return TransformerDecoder(
        layers=[
            DecoderLayer(
                self_attention=SelfAttention(channels=C, num_heads=2),
                cross_attention=cross_attention or DenseDecoderAttention(channels=C, num_heads=2),
                feedforward=FeedForward(channels=C, hidden_channels=12),
                channels=C,
            )
        ],
        heads=[prediction_head()],
        query_position=BoxQueryPosition(channels=C) if boxes else StoredQueryPosition(),
    )


def deformable() -> DeformableDecoderAttention:
    return DeformableDecoderAttention(channels=C, num_heads=2, num_levels=2, num_points=2)


def two_stage() -> BoxEmbeddedQueries:
    return BoxEmbeddedQueries(num_queries=4, channels=C, score=FirstClassScore())


def denoising() -> ContrastiveDenoising:
    return ContrastiveDenoising(num_classes=3, channels=C, num_queries=4)


def build(**parts: Any) -> Detector:
    """A dense two-level detector with learned queries, apart from the given parts."""
    common: dict[str, Any] = dict(
        backbone=PatchBackbone([8, 12, 16]),
        neck=ChannelMapper(
            in_features=["res4", "res5"],
            in_channels=[12, 16],
            channels=C,
            num_levels=2,
            num_groups=2,
        ),
        tokenizer=FeatureTokenizer(
            position_embedding=SinePositionEmbedding(channels=C), num_levels=2
        ),
        encoder=encoder(),
        queries=LearnedQueries(num_queries=4, channels=C),
        decoder=decoder(),
    )
    return Detector(**{**common, **parts})


FITTING: list[dict[str, Any]] = [
    {},
    dict(queries=ReferencePointQueries(num_queries=4, channels=C), decoder=decoder(deformable())),
    dict(queries=two_stage(), proposals=proposal_head()),
    dict(
        queries=LearnedContentQueries(num_queries=4, channels=C),
        proposals=proposal_head(),
        decoder=decoder(deformable(), boxes=True),
        denoising=denoising(),
    ),
    dict(queries=two_stage(), proposals=proposal_head(), selection=selector()),
    dict(selection=selector(), proposals=token_transform()),
    dict(
        selection=selector(),
        proposals=token_transform(),
        encoder_heads=EncoderLayerHeads(heads=[prediction_head()]),
    ),
]


@pytest.mark.parametrize("parts", FITTING)
def test_what_passes_the_checks_runs(parts: dict[str, Any]) -> None:
    detector = build(**parts)
    mask = padding_mask([(64, 96), (48, 64)], (64, 96))
    targets = targets_of([[0.5, 0.5, 0.2, 0.2]], [])
    output = detector(torch.randn(2, 3, 64, 96), mask, targets)
    assert output.prediction.logits.shape == (2, 4, 3)
    assert output.prediction.boxes.isfinite().all()


class BackboneWithShapes(Backbone):
    """A Detectron2 backbone as far as the neck wants to know it."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raise AssertionError("nothing runs that does not fit")

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res4": ShapeSpec(channels=12), "res5": ShapeSpec(channels=16)}


@pytest.mark.parametrize(
    ("in_features", "in_channels", "message"),
    [
        (
            ["res3", "res4"],
            [8, 12],
            "neck.in_features names 'res3', but the backbone gives res4, res5: change neck",
        ),
        (
            ["res4", "res5"],
            [12, 99],
            "neck.in_channels says 99 for 'res5', but the backbone gives 16: change neck",
        ),
    ],
)
def test_backbone_and_neck(in_features: list[str], in_channels: list[int], message: str) -> None:
    neck = ChannelMapper(
        in_features=in_features, in_channels=in_channels, channels=C, num_levels=2, num_groups=2
    )
    with pytest.raises(ConfigError, match=message):
        build(backbone=BackboneWithShapes(), neck=neck)


def changed_config(family: str, **changes: Any) -> Any:
    config = tiny_config(family)
    for path, value in changes.items():
        node = config.detector
        *parents, last = path.split("__")
        for name in parents:
            node = node[int(name)] if name.isdigit() else node[name]
        node[last] = value
    return config


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "dino",
            dict(neck__num_levels=5),
            r"tokenizer \(LevelFeatureTokenizer\) is built for num_levels=4, "
            r"but neck.num_levels=5 \(ChannelMapper\): set them to the same number",
        ),
        (
            "dino",
            dict(encoder__layers__1__attention__num_levels=3),
            r"encoder.layers.1.attention \(DeformableEncoderAttention\) is built for num_levels=3, "
            "but neck.num_levels=4",
        ),
        (
            "dino",
            dict(decoder__layers__0__cross_attention__num_levels=2),
            r"decoder.layers.0.cross_attention \(DeformableDecoderAttention\) is built for "
            "num_levels=2, but neck.num_levels=4",
        ),
        (
            "focus_detr",
            dict(selection__num_levels=3),
            r"selection \(ForegroundTokenSelector\) is built for num_levels=3, but neck",
        ),
        (
            "focus_detr",
            dict(selection__layer_keep_ratios=[1.0]),
            r"selection.layer_keep_ratios has 1 entries for 2 encoder.layers",
        ),
        (
            "focus_detr",
            dict(selection=None),
            "encoder.layers holds DualAttentionEncoderLayer, which needs selection: set selection",
        ),
        (
            "focus_detr",
            dict(encoder__object_score=None),
            "DualAttentionEncoderLayer, which needs encoder.object_score: set encoder.object_score",
        ),
    ],
)
def test_changes_of_a_config(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        instantiate(changed_config(family, **changes))


class WholeMaps(nn.Module):
    """An encoder of another kind."""

    def forward(self, tokens: FeatureTokens, selection: None, head: None) -> EncoderOutput:
        return EncoderOutput(tokens)


def test_an_encoder_of_another_kind_runs() -> None:
    output = build(encoder=WholeMaps())(
        torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    )
    assert output.selection is None


def test_a_selection_needs_a_transformer_encoder() -> None:
    message = (
        r"detector.selection \(SalientTokenSelector\) selects tokens, but WholeMaps updates whole "
        "maps: remove the selection or use TransformerEncoder"
    )
    with pytest.raises(ConfigError, match=message):
        build(encoder=WholeMaps(), selection=selector(), proposals=token_transform())


def test_a_selection_needs_proposals() -> None:
    message = (
        r"detector.selection \(SalientTokenSelector\) scores tokens through the transform of "
        "detector.proposals, which is not set"
    )
    with pytest.raises(ConfigError, match=message):
        build(selection=selector())


def test_a_selection_needs_a_ratio_for_each_layer() -> None:
    message = "selection.layer_keep_ratios has 3 entries for 2 encoder.layers"
    with pytest.raises(ConfigError, match=message):
        build(selection=selector(3), proposals=token_transform())


class WholeLevelAttention(EncoderAttention):
    attends_whole_levels = True


def test_an_attention_over_whole_levels_cannot_have_a_selection() -> None:
    build(encoder=encoder(WholeLevelAttention))
    message = (
        r"encoder.layers.0.attention \(WholeLevelAttention\) needs every token of a level, but "
        r"detector.selection \(SalientTokenSelector\) selects some"
    )
    with pytest.raises(ConfigError, match=message):
        build(
            encoder=encoder(WholeLevelAttention), selection=selector(), proposals=token_transform()
        )


@pytest.mark.parametrize("source", [two_stage(), LearnedContentQueries(num_queries=4, channels=C)])
def test_two_stage_queries_need_proposals(source: nn.Module) -> None:
    message = (
        rf"detector.queries \({type(source).__name__}\) selects among detector.proposals, "
        "which is not set"
    )
    with pytest.raises(ConfigError, match=message):
        build(queries=source, decoder=decoder(boxes=True))


@pytest.mark.parametrize(
    "source",
    [
        LearnedQueries(num_queries=4, channels=C),
        ReferencePointQueries(num_queries=4, channels=C),  # points, but no boxes
    ],
)
def test_denoising_needs_reference_boxes(source: nn.Module) -> None:
    message = (
        r"detector.denoising \(ContrastiveDenoising\) adds reference boxes to those of the "
        rf"queries, but detector.queries \({type(source).__name__}\) gives none: use two-stage"
    )
    with pytest.raises(ConfigError, match=message):
        build(queries=source, denoising=denoising())


def test_denoising_needs_positions_from_boxes() -> None:
    message = (
        r"detector.denoising \(ContrastiveDenoising\) makes queries without positions, but "
        r"decoder.query_position \(StoredQueryPosition\) uses stored ones: use BoxQueryPosition"
    )
    with pytest.raises(ConfigError, match=message):
        build(queries=two_stage(), proposals=proposal_head(), denoising=denoising())


@pytest.mark.parametrize(
    "source",
    [
        LearnedQueries(num_queries=4, channels=C),
        ReferencePointQueries(num_queries=4, channels=C),
    ],
)
def test_positions_from_boxes_need_boxes(source: nn.Module) -> None:
    message = (
        r"decoder.query_position \(BoxQueryPosition\) needs reference boxes, but "
        rf"detector.queries \({type(source).__name__}\) gives none: use two-stage queries or "
        "StoredQueryPosition"
    )
    with pytest.raises(ConfigError, match=message):
        build(queries=source, decoder=decoder(boxes=True))


def test_stored_positions_need_queries_with_positions() -> None:
    message = (
        r"decoder.query_position \(StoredQueryPosition\) uses the positions of the queries, but "
        r"detector.queries \(LearnedContentQueries\) gives none: use BoxQueryPosition"
    )
    with pytest.raises(ConfigError, match=message):
        build(queries=LearnedContentQueries(num_queries=4, channels=C), proposals=proposal_head())


def test_attention_around_references_needs_references() -> None:
    message = (
        r"decoder.layers.0.cross_attention \(DeformableDecoderAttention\) looks around references, "
        r"but detector.queries \(LearnedQueries\) gives none: use queries with references"
    )
    with pytest.raises(ConfigError, match=message):
        build(decoder=decoder(deformable()))


class PredictingAttention(DeformableDecoderAttention):
    """Predicts reference points in the middle, if it may."""

    def predict_reference_logits(self, layer_input: Tensor) -> Tensor:
        return torch.zeros_like(layer_input[..., :2])

    @property
    def predicts_references(self) -> bool:
        return True


def test_the_first_attention_may_predict_the_references_itself() -> None:
    attention = PredictingAttention(channels=C, num_heads=2, num_levels=2, num_points=2)
    output = build(decoder=decoder(attention))(
        torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    )
    assert output.decoder.references is not None
    assert output.decoder.references.eq(0.5).all()
    assert output.decoder.references.shape == (1, 1, 4, 2)


def test_predictions_of_references_that_the_queries_give_already() -> None:
    attention = PredictingAttention(channels=C, num_heads=2, num_levels=2, num_points=2)
    message = (
        r"decoder.layers.0.cross_attention \(PredictingAttention\) predicts references, but "
        r"detector.queries \(ReferencePointQueries\) gives them"
    )
    with pytest.raises(ConfigError, match=message):
        build(queries=ReferencePointQueries(num_queries=4, channels=C), decoder=decoder(attention))


def test_only_the_first_layer_is_asked_for_references() -> None:
    attentions = [
        PredictingAttention(channels=C, num_heads=2, num_levels=2, num_points=2) for _ in range(2)
    ]
    first, second = (decoder(attention) for attention in attentions)
    layers: Any = [*first.layers, *second.layers]
    both = TransformerDecoder(
        layers=layers, heads=[prediction_head()], query_position=StoredQueryPosition()
    )
    message = (
        r"decoder.layers.1.cross_attention \(PredictingAttention\) predicts references, but the "
        r"decoder \(TransformerDecoder\) asks its first layer only"
    )
    with pytest.raises(ConfigError, match=message):
        build(decoder=both)


def test_a_selection_among_levels_needs_several() -> None:
    attention = ScaleSelectiveModulatedAttention(
        channels=C,
        num_heads=2,
        scale=ConstantScale(channels=C, num_heads=2, num_levels=1),
        strides=[32],
        distance_factors=[1.0],
    )
    neck = ChannelMapper(
        in_features=["res5"], in_channels=[16], channels=C, num_levels=1, num_groups=2
    )
    tokenizer = FeatureTokenizer(position_embedding=SinePositionEmbedding(channels=C), num_levels=1)
    message = (
        r"decoder.layers.0.cross_attention \(ScaleSelectiveModulatedAttention\) selects among "
        r"levels, but detector.neck \(ChannelMapper\) gives a single one"
    )
    with pytest.raises(ConfigError, match=message):
        build(neck=neck, tokenizer=tokenizer, decoder=decoder(attention))


def test_proposals_without_a_head_cannot_be_selected() -> None:
    message = (
        r"detector.queries \(BoxEmbeddedQueries\) selects among proposals, but "
        r"detector.proposals \(ProposalHead\) has no head to make them: set proposals.head"
    )
    with pytest.raises(ConfigError, match=message):
        build(queries=two_stage(), proposals=token_transform())


def test_proposals_that_nothing_uses() -> None:
    message = (
        r"detector.proposals \(ProposalHead\) is used by nothing: detector.queries "
        r"\(LearnedQueries\) selects no proposals"
    )
    for proposals in (proposal_head(), token_transform()):
        with pytest.raises(ConfigError, match=message):
            build(proposals=proposals)


def test_a_proposal_head_that_no_loss_would_reach() -> None:
    message = (
        r"the head of detector.proposals \(ProposalHead\) would not be trained, as "
        r"detector.queries \(LearnedQueries\) selects no proposals: set proposals.head=None"
    )
    with pytest.raises(ConfigError, match=message):
        build(selection=selector(), proposals=proposal_head())


def test_object_attention_needs_trained_classes() -> None:
    config = tiny_config("focus_detr")
    config.detector.denoising = None
    config.detector.queries = L(LearnedQueries)(num_queries=4, channels=16)
    config.detector.decoder.query_position = L(StoredQueryPosition)()
    message = (
        "encoder.layers holds DualAttentionEncoderLayer, which ranks tokens by the classes of "
        r"detector.proposals, but detector.queries \(LearnedQueries\) leaves these untrained"
    )
    with pytest.raises(ConfigError, match=message):
        instantiate(config)


def test_positions_of_the_queries_would_be_lost() -> None:
    message = (
        r"decoder.query_position \(BoxQueryPosition\) makes positions from boxes, but "
        r"detector.queries \(BoxEmbeddedQueries\) gives positions of its own"
    )
    with pytest.raises(ConfigError, match=message):
        build(queries=two_stage(), proposals=proposal_head(), decoder=decoder(boxes=True))


def test_encoder_heads_need_proposals() -> None:
    message = (
        r"detector.encoder_heads \(EncoderLayerHeads\) refines the boxes of detector.proposals, "
        "which is not set"
    )
    with pytest.raises(ConfigError, match=message):
        build(encoder_heads=EncoderLayerHeads(heads=[prediction_head()]))


@pytest.mark.parametrize("encoder_kind", [encoder, WholeMaps])
def test_encoder_heads_need_a_selection(encoder_kind: Any) -> None:
    message = r"detector.encoder_heads \(EncoderLayerHeads\) .* set detector.selection"
    with pytest.raises(ConfigError, match=message):
        build(
            encoder=encoder_kind(),
            queries=two_stage(),
            proposals=proposal_head(),
            encoder_heads=EncoderLayerHeads(heads=[prediction_head()]),
        )


@pytest.mark.parametrize("count", [0, 2])
def test_encoder_heads_are_one_fewer_than_the_layers(count: int) -> None:
    message = f"detector.encoder_heads has {count} heads for 2 encoder.layers: give 1"
    with pytest.raises(ConfigError, match=message):
        build(
            selection=selector(),
            proposals=token_transform(),
            encoder_heads=EncoderLayerHeads(heads=[prediction_head() for _ in range(count)]),
        )
