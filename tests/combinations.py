"""What detectors can be put together from, at tiny sizes: the data of a test and of a document.

`tests/test_combinations.py` builds and trains every combination; `tools/write_combinations.py`
writes docs/combinations.md.
"""

from __future__ import annotations

import contextlib
import dataclasses

from detectron2.config import instantiate

from efficient_detr.errors import ConfigError
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention import (
    DeformableDecoderAttention,
    DeformableEncoderAttention,
    DenseDecoderAttention,
    DenseEncoderAttention,
    SelfAttention,
)
from efficient_detr.modeling.attention.clustered import (
    ClusteredEncoderAttention,
    ClusteredSelfAttention,
)
from efficient_detr.modeling.attention.intra_scale import IntraScaleAttention
from efficient_detr.modeling.attention.spatially_modulated import (
    ScaleSelectiveModulatedAttention,
    SpatiallyModulatedAttention,
)
from efficient_detr.modeling.decoder import (
    PreNormDecoderLayer,
)
from efficient_detr.modeling.encoder import (
    DualAttentionEncoderLayer,
    EncoderLayer,
    PreNormEncoderLayer,
)
from efficient_detr.modeling.pyramid_encoder import (
    PyramidEncoder,
)
from efficient_detr.modeling.queries import (
    BoxEmbeddedQueries,
    LearnedContentQueries,
    LearnedQueries,
    MemoryContentQueries,
    ReferencePointQueries,
)
from efficient_detr.modeling.queries.interface import QuerySource
from efficient_detr.modeling.refinement import (
    FixedReferences,
    IterativeRefinement,
    LookForwardTwice,
)
from efficient_detr.modeling.selection import (
    ForegroundTokenSelector,
    SalientTokenSelector,
)
from tests.combination_parts import (
    FEATURES,
    Combination,
    DecoderKind,
    EncoderKind,
    config,
)
from tests.tiny_models import with_noise

ENCODER_ATTENTIONS = {
    "deformable (Deformable DETR)": DeformableEncoderAttention,
    "dense (DETR)": DenseEncoderAttention,
    "intra-scale (SMCA)": IntraScaleAttention,
    "clustered (ACT)": ClusteredEncoderAttention,
    "convolutional pyramid (SMCA)": PyramidEncoder,
}
# What is selected, by which class, and the layers that update the selected tokens.
SELECTIONS: dict[str, tuple[type | None, type]] = {
    "all tokens": (None, EncoderLayer),
    "foreground (Focus-DETR)": (ForegroundTokenSelector, EncoderLayer),
    "foreground, dual attention (Focus-DETR)": (
        ForegroundTokenSelector,
        DualAttentionEncoderLayer,
    ),
    "salient (Sparse DETR)": (SalientTokenSelector, EncoderLayer),
}
ENCODERS = [
    EncoderKind(f"{attention}, {selected}", kind, selection, layer)
    for attention, kind in ENCODER_ATTENTIONS.items()
    for selected, (selection, layer) in SELECTIONS.items()
]
DECODERS = [
    DecoderKind("deformable, points", DeformableDecoderAttention, ReferencePointQueries),
    DecoderKind(
        "deformable, refined boxes",
        DeformableDecoderAttention,
        ReferencePointQueries,
        IterativeRefinement,
    ),
    DecoderKind(
        "deformable, two-stage boxes",
        DeformableDecoderAttention,
        BoxEmbeddedQueries,
        IterativeRefinement,
    ),
    DecoderKind(
        "deformable, memory content (Sparse DETR)",
        DeformableDecoderAttention,
        MemoryContentQueries,
        IterativeRefinement,
    ),
    DecoderKind(
        "deformable, denoising (DINO)",
        DeformableDecoderAttention,
        LearnedContentQueries,
        LookForwardTwice,
        denoising=True,
    ),
    DecoderKind("dense (DETR)", DenseDecoderAttention, LearnedQueries),
    DecoderKind(
        "dense, clustered self-attention (ACT)",
        DenseDecoderAttention,
        LearnedQueries,
        self_attention=ClusteredSelfAttention,
    ),
    DecoderKind("modulated, one level (SMCA)", SpatiallyModulatedAttention, LearnedQueries),
    DecoderKind(
        "modulated, scale-selective (SMCA)", ScaleSelectiveModulatedAttention, LearnedQueries
    ),
]
QUERY_SOURCES: dict[str, tuple[type[QuerySource], type]] = {
    "learned (DETR, SMCA)": (LearnedQueries, FixedReferences),
    "reference points (Deformable DETR)": (ReferencePointQueries, FixedReferences),
    "box embedding (Deformable DETR, two-stage)": (BoxEmbeddedQueries, IterativeRefinement),
    "memory content (Sparse DETR)": (MemoryContentQueries, IterativeRefinement),
    "learned content (DINO)": (LearnedContentQueries, LookForwardTwice),
}
DECODER_ATTENTIONS = {
    "deformable": DeformableDecoderAttention,
    "dense": DenseDecoderAttention,
    "modulated, one level": SpatiallyModulatedAttention,
    "modulated, scale-selective": ScaleSelectiveModulatedAttention,
}


# Building takes a while, and the document wants to know what the test found out before.
_REFUSALS: dict[Combination, str | None] = {}


def combinations() -> list[Combination]:
    """Every encoder with every decoder, over both kinds of memory; some make no sense."""
    return [
        Combination(encoder, decoder, levels)
        for levels in FEATURES
        for encoder in ENCODERS
        for decoder in DECODERS
    ]


def query_combinations() -> list[Combination]:
    """Every query source with every cross-attention, behind an encoder with deformable attention.

    The memory has three levels, or one where the cross-attention wants that.
    """
    return [
        Combination(
            ENCODERS[0],
            DecoderKind(f"{name}, {source}", attention, queries, refinement),
            num_levels=1 if attention is SpatiallyModulatedAttention else 3,
        )
        for source, (queries, refinement) in QUERY_SOURCES.items()
        for name, attention in DECODER_ATTENTIONS.items()
    ]


def other_combinations() -> dict[str, list[Combination]]:
    """Parts that are no row or column of a table, each with several neighbours."""
    dense = EncoderKind("dense", DenseEncoderAttention)
    points = (DeformableDecoderAttention, ReferencePointQueries)
    # In every decoder but the one that has it in its column.
    clustered = [
        Combination(
            dense,
            dataclasses.replace(
                decoder, title=f"{decoder.title}, clustered", self_attention=ClusteredSelfAttention
            ),
            num_levels=1 if decoder.attention is SpatiallyModulatedAttention else 3,
        )
        for decoder in DECODERS
        if decoder.self_attention is SelfAttention
    ]
    refined = [
        Combination(dense, DecoderKind(refinement.__name__, *parts, refinement), num_levels=3)
        for refinement in (FixedReferences, IterativeRefinement, LookForwardTwice)
        for parts in [
            points,
            (DeformableDecoderAttention, MemoryContentQueries),
            (DenseDecoderAttention, LearnedQueries),
            (ScaleSelectiveModulatedAttention, LearnedQueries),
        ]
    ]
    attentions = [kind for kind in ENCODER_ATTENTIONS.values() if kind is not PyramidEncoder]
    pre_norm = [
        Combination(
            EncoderKind(f"{attention.__name__}, pre-norm", attention, None, PreNormEncoderLayer),
            DecoderKind("pre-norm", *parts, layer=PreNormDecoderLayer),
            num_levels=3,
        )
        for attention, parts in zip(
            attentions,
            [points, (DenseDecoderAttention, LearnedQueries)] * 2,
            strict=True,
        )
    ]
    return {
        "Clustered self-attention among the queries (`ClusteredSelfAttention`)": clustered,
        "Rules by which boxes follow from corrections": refined,
        "Pre-norm layers (`PreNormEncoderLayer`, `PreNormDecoderLayer`)": pre_norm,
    }


def build(combination: Combination) -> EfficientDETR:
    """A model in training mode, with weights off their start values.

    Raises:
        ConfigError: if the combination makes no sense.
    """
    try:
        model: EfficientDETR = with_noise(instantiate(config(combination)))
    except ConfigError as error:
        _REFUSALS[combination] = str(error)
        raise
    _REFUSALS[combination] = None
    return model


def refusal(combination: Combination) -> str | None:
    """The sentence with which the combination fails to build, or None if it builds."""
    if combination not in _REFUSALS:
        with contextlib.suppress(ConfigError):
            build(combination)
    return _REFUSALS[combination]


# Why what a detector predicts for an image may depend on the images beside it. Everything else is
# equal to 1e-4; the test shows that by putting these traits aside.
PADDING_TRAITS = {
    "scores": (
        "The token scores of an image contain means over the padding, and later layers keep a part "
        "of the largest image's tokens, both as published. Given the same scores and images of "
        "equal area, all is equal."
    ),
    "proposals": (
        "Tokens without a valid proposal, such as padding, compete with one and the same score, as "
        "published. As long as they score below the proposals that become queries, all is equal."
    ),
    "positions": (
        "BoxQueryPosition embeds reference boxes as seen in the padded batch, as published. With "
        "boxes as seen in the image, all is equal."
    ),
    "convolutions": (
        "The convolutions of the pyramid do not mask padding, as the published weights expect: "
        "cells at its border see what the batch is padded with."
    ),
}


def padding_traits(combination: Combination) -> list[str]:
    """Keys of `PADDING_TRAITS` that apply to a combination."""
    traits = []
    if combination.encoder.selection is not None:
        traits.append("scores")
    if combination.decoder.queries.needs_proposals:
        traits.append("proposals")
    if not combination.decoder.queries.gives_positions:
        traits.append("positions")
    if combination.encoder.attention is PyramidEncoder:
        traits.append("convolutions")
    return traits
