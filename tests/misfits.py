"""Parts that do not fit together, beside those of the tables in `tests.combinations`.

Each starts from a combination that makes sense and changes parts of its config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.config import instantiate

from efficient_detr.errors import ConfigError
from efficient_detr.losses import ForegroundLoss, SideDistanceForeground, SoftmaxClassLoss
from efficient_detr.losses.distillation import BoxDistillationLoss
from efficient_detr.losses.matcher import SoftmaxClassCost
from efficient_detr.losses.token_attention import TokenAttentionLoss
from efficient_detr.modeling.attention import DeformableDecoderAttention
from efficient_detr.modeling.decoder import BoxQueryPosition, StoredQueryPosition
from efficient_detr.modeling.distillation import DistillationDetector
from efficient_detr.modeling.queries import (
    BoxEmbeddedQueries,
    ProposalHead,
    ReferencePointQueries,
)
from efficient_detr.postprocessing import SoftmaxBestClass
from tests.combination_parts import CHANNELS, Combination, DecoderKind, config, head_config
from tests.combinations import DECODERS, ENCODERS

POINTS, REFINED, BOXES, MEMORY, DINO, DENSE, _, MODULATED, SELECTIVE = DECODERS
DEFORMABLE, FOREGROUND, DUAL, SALIENT = ENCODERS[:4]
CLUSTERED = next(kind for kind in ENCODERS if kind.title == "clustered (ACT), all tokens")


@dataclass(frozen=True)
class Misfit:
    """A config that must fail to build.

    Attributes:
        title: what is wrong, for the document.
        encoder: row of the combination to start from.
        decoder: its column.
        names: what the sentence must contain: both parts.
        changes: values by their dotted place in the config; a last "+" appends to a list.
        num_levels: of the memory.
    """

    title: str
    encoder: Any
    decoder: Any
    names: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    num_levels: int = 3

    def __str__(self) -> str:
        return self.title

    def config(self) -> Any:
        """The config."""
        model = config(Combination(self.encoder, self.decoder, self.num_levels))
        for place, value in self.changes.items():
            *parents, last = place.split(".")
            node = model
            for name in parents:
                node = node[int(name)] if name.isdigit() else node[name]
            if last == "+":
                node.append(value)
            else:
                node[last] = value
        return model

    def sentence(self) -> str | None:
        """What building it says, or None if it builds."""
        try:
            instantiate(self.config())
        except ConfigError as error:
            return str(error)
        return None


def misfits() -> list[Misfit]:
    """All of them, by subject."""
    return [
        *_levels(),
        *_selections(),
        *_query_positions(),
        *_proposals(),
        *_centers(),
        *_losses(),
        *_classes(),
        *_distillation(),
    ]


def _levels() -> list[Misfit]:
    return [
        Misfit(
            "attention for another number of levels",
            DEFORMABLE,
            POINTS,
            ("DeformableDecoderAttention", "ChannelMapper"),
            {"detector.decoder.layers.1.cross_attention.num_levels": 2},
        ),
        Misfit(
            "tokens of another number of levels",
            DEFORMABLE,
            POINTS,
            ("LevelFeatureTokenizer", "ChannelMapper"),
            {"detector.tokenizer.num_levels": 4},
        ),
        Misfit(
            "decoder heads for another number of layers",
            DEFORMABLE,
            POINTS,
            ("decoder.heads", "decoder.layers"),
            {"detector.decoder.heads.+": head_config()},
        ),
    ]


def _selections() -> list[Misfit]:
    return [
        Misfit(
            "a selection without the transform that scores tokens",
            SALIENT,
            POINTS,
            ("SalientTokenSelector", "ProposalHead"),
            {"detector.proposals": None},
        ),
        Misfit(
            "a selection for another number of layers",
            SALIENT,
            POINTS,
            ("selection.layer_keep_ratios", "encoder.layers"),
            {"detector.selection.num_layers": 3},
        ),
        Misfit(
            "dual attention without a selection",
            DUAL,
            DINO,
            ("DualAttentionEncoderLayer", "selection"),
            {"detector.selection": None},
        ),
        Misfit(
            "dual attention without a ranking of object tokens",
            DUAL,
            DINO,
            ("DualAttentionEncoderLayer", "encoder.object_score"),
            {"detector.encoder.object_score": None},
        ),
        Misfit(
            "heads for encoder layers without a selection",
            SALIENT,
            MEMORY,
            ("EncoderLayerHeads", "selection"),
            {"detector.selection": None},
        ),
        Misfit(
            "heads for another number of encoder layers",
            SALIENT,
            MEMORY,
            ("encoder_heads", "encoder.layers"),
            {"detector.encoder_heads.heads.+": head_config()},
        ),
        Misfit(
            "a map of attention that is not deformable",
            SALIENT,
            DENSE,
            ("map_token_attention", "DenseDecoderAttention"),
            {"detector.decoder.map_token_attention": True},
        ),
    ]


def _query_positions() -> list[Misfit]:
    noised = DecoderKind("", DeformableDecoderAttention, BoxEmbeddedQueries, denoising=True)
    noised_points = DecoderKind(
        "", DeformableDecoderAttention, ReferencePointQueries, denoising=True
    )
    return [
        Misfit(
            "denoising for queries without boxes",
            DEFORMABLE,
            noised_points,
            ("ContrastiveDenoising", "ReferencePointQueries"),
        ),
        Misfit(
            "denoising for queries with positions of their own",
            DEFORMABLE,
            noised,
            ("ContrastiveDenoising", "StoredQueryPosition"),
        ),
        Misfit(
            "positions from boxes that the queries do not have",
            DEFORMABLE,
            DENSE,
            ("BoxQueryPosition", "LearnedQueries"),
            {"detector.decoder.query_position": L(BoxQueryPosition)(channels=CHANNELS)},
        ),
        Misfit(
            "positions from boxes beside those of the queries",
            DEFORMABLE,
            MEMORY,
            ("BoxQueryPosition", "MemoryContentQueries"),
            {"detector.decoder.query_position": L(BoxQueryPosition)(channels=CHANNELS)},
        ),
        Misfit(
            "stored positions that the queries do not have",
            DEFORMABLE,
            DINO,
            ("StoredQueryPosition", "LearnedContentQueries"),
            {
                "detector.denoising": None,
                "detector.decoder.query_position": L(StoredQueryPosition)(),
            },
        ),
    ]


def _proposals() -> list[Misfit]:
    return [
        Misfit(
            "two-stage queries without proposals",
            DEFORMABLE,
            BOXES,
            ("BoxEmbeddedQueries", "detector.proposals"),
            {"detector.proposals": None},
        ),
        Misfit(
            "two-stage queries whose proposals have no head",
            FOREGROUND,
            BOXES,
            ("BoxEmbeddedQueries", "ProposalHead"),
            {"detector.proposals.head": None},
        ),
        Misfit(
            "proposals that nobody selects",
            DEFORMABLE,
            DENSE,
            ("ProposalHead", "LearnedQueries"),
            {"detector.proposals": L(ProposalHead)(channels=CHANNELS, head=head_config())},
        ),
        Misfit(
            "a head of proposals that nothing trains",
            FOREGROUND,
            DENSE,
            ("ProposalHead", "LearnedQueries"),
            {"detector.proposals.head": head_config()},
        ),
    ]


def _centers() -> list[Misfit]:
    first, second = (f"detector.decoder.layers.{index}.cross_attention" for index in range(2))
    selective = DecoderKind("", SELECTIVE.attention, ReferencePointQueries)
    layer = config(Combination(DEFORMABLE, SELECTIVE, 3)).detector.decoder.layers[0]
    center_prediction = layer.cross_attention.center_prediction
    return [
        Misfit(
            "modulated attention that nobody gives a centre",
            DEFORMABLE,
            SELECTIVE,
            ("ScaleSelectiveModulatedAttention", "LearnedQueries"),
            {f"{first}.center_prediction": None},
        ),
        Misfit(
            "predicted centres for queries that have reference points",
            DEFORMABLE,
            selective,
            ("ScaleSelectiveModulatedAttention", "ReferencePointQueries"),
            {f"{first}.center_prediction": center_prediction},
        ),
        Misfit(
            "centres predicted in a later layer",
            DEFORMABLE,
            SELECTIVE,
            ("ScaleSelectiveModulatedAttention", "TransformerDecoder"),
            {f"{second}.center_prediction": center_prediction},
        ),
    ]


def _losses() -> list[Misfit]:
    labels = L(SideDistanceForeground)(strides=[8, 16], ends=[32])
    return [
        Misfit(
            "a selection that no loss trains",
            FOREGROUND,
            DINO,
            ("ForegroundTokenSelector", "SetLoss"),
            {"losses": config(Combination(DEFORMABLE, DINO, 3)).losses},
        ),
        Misfit(
            "the loss of a foreground selection without one",
            DEFORMABLE,
            DINO,
            ("ForegroundLoss", "detector.selection"),
            {"losses.+": L(ForegroundLoss)(labels=labels)},
        ),
        Misfit(
            "labels of foreground for another number of levels",
            FOREGROUND,
            DINO,
            ("SideDistanceForeground", "ChannelMapper"),
            {"losses.1.labels": labels},
        ),
        Misfit(
            "the loss of a salient selection without one",
            DEFORMABLE,
            MEMORY,
            ("TokenAttentionLoss", "detector.selection"),
            {"losses.+": L(TokenAttentionLoss)()},
        ),
        Misfit(
            "the loss of a salient selection without a map of attention",
            SALIENT,
            DENSE,
            ("TokenAttentionLoss", "decoder.map_token_attention"),
            {"losses.+": L(TokenAttentionLoss)()},
        ),
    ]


def _classes() -> list[Misfit]:
    return [
        Misfit(
            "softmax classes without one for no object",
            DEFORMABLE,
            DENSE,
            ("SoftmaxClassLoss", "PredictionHead"),
            {"losses.0.class_loss": L(SoftmaxClassLoss)()},
        ),
        Misfit(
            "matching by softmax, training by focal loss",
            DEFORMABLE,
            DENSE,
            ("SoftmaxClassCost", "PredictionHead"),
            {"losses.0.matcher.class_cost": L(SoftmaxClassCost)()},
        ),
        Misfit(
            "sigmoid classes detected by softmax",
            DEFORMABLE,
            DENSE,
            ("SoftmaxBestClass", "PredictionHead"),
            {"postprocessor": L(SoftmaxBestClass)()},
        ),
        Misfit(
            "focal loss with a class for no object",
            DEFORMABLE,
            DENSE,
            ("FocalClassCost", "PredictionHead"),
            {"detector.decoder.heads.0.background_classes": 1},
        ),
        Misfit(
            "another number of classes in a head",
            DEFORMABLE,
            BOXES,
            ("PredictionHead", "EfficientDETR"),
            {"detector.proposals.head.num_classes": 91},
        ),
        Misfit(
            "another number of classes in the denoising",
            DEFORMABLE,
            DINO,
            ("ContrastiveDenoising", "EfficientDETR"),
            {"detector.denoising.num_classes": 91},
        ),
    ]


def _distillation() -> list[Misfit]:
    distilled = {
        "detector._target_": DistillationDetector,
        "losses.+": L(BoxDistillationLoss)(),
    }
    return [
        Misfit(
            "distillation without clustered attention",
            DEFORMABLE,
            DENSE,
            ("DistillationDetector", "ClusteredEncoderAttention"),
            distilled,
        ),
        Misfit(
            "distillation of queries that are selected",
            CLUSTERED,
            BOXES,
            ("DistillationDetector", "BoxEmbeddedQueries"),
            distilled,
        ),
        Misfit(
            "distillation without its loss",
            CLUSTERED,
            DENSE,
            ("DistillationDetector", "SetLoss"),
            {"detector._target_": DistillationDetector},
        ),
        Misfit(
            "the loss of distillation without it",
            CLUSTERED,
            DENSE,
            ("BoxDistillationLoss", "DistillationDetector"),
            {"losses.+": L(BoxDistillationLoss)()},
        ),
    ]
