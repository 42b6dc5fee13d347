"""Checks, when a detector is built, that its parts fit together. Every message names both parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from detectron2.modeling import Backbone

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.interface import DecoderAttention, EncoderAttention
from efficient_detr.modeling.attention.spatially_modulated import (
    ScaleSelectiveModulatedAttention,
    SpatiallyModulatedAttention,
)
from efficient_detr.modeling.decoder import DecoderLayer
from efficient_detr.modeling.encoder import DualAttentionEncoderLayer, TransformerEncoder

if TYPE_CHECKING:
    from efficient_detr.modeling.detector import Detector


def check_parts(detector: Detector) -> None:
    """Check all parts of a detector.

    Raises:
        ConfigError: at the first two parts that do not fit together.
    """
    _check_backbone(detector)
    _check_modulated_levels(detector)
    _check_levels(detector)
    _check_selection(detector)
    _check_object_score(detector)
    _check_proposals(detector)
    _check_denoising(detector)
    _check_query_positions(detector)
    _check_references(detector)
    _check_center_predictions(detector)
    _check_encoder_heads(detector)


def _check_backbone(detector: Detector) -> None:
    if not isinstance(detector.backbone, Backbone):
        return
    neck, shapes = detector.neck, detector.backbone.output_shape()
    for name, channels in zip(neck.in_features, neck.in_channels, strict=True):
        if name not in shapes:
            raise ConfigError(
                f"neck.in_features names '{name}', but the backbone gives {', '.join(shapes)}: "
                "change neck.in_features or backbone.out_features"
            )
        if shapes[name].channels != channels:
            raise ConfigError(
                f"neck.in_channels says {channels} for '{name}', but the backbone gives "
                f"{shapes[name].channels}: change neck.in_channels"
            )


def _check_levels(detector: Detector) -> None:
    """Every part that is built for a number of levels must be built for that of the neck."""
    expected = detector.neck.num_levels
    for name, module in detector.named_modules():
        num_levels = getattr(module, "num_levels", expected)
        if num_levels != expected:
            raise ConfigError(
                f"{name} ({type(module).__name__}) is built for num_levels={num_levels}, but "
                f"neck.num_levels={expected} ({type(detector.neck).__name__}): set them to the "
                "same number"
            )


def _check_modulated_levels(detector: Detector) -> None:
    """Modulated attention is one class for one level, another for several."""
    num_levels, neck = detector.neck.num_levels, type(detector.neck).__name__
    for name, attention in _cross_attentions(detector):
        if isinstance(attention, ScaleSelectiveModulatedAttention) and num_levels == 1:
            raise ConfigError(
                f"{name} (ScaleSelectiveModulatedAttention) selects among levels, but "
                f"detector.neck ({neck}) gives a single one: use SpatiallyModulatedAttention or "
                "raise neck.num_levels"
            )
        if isinstance(attention, SpatiallyModulatedAttention) and num_levels > 1:
            raise ConfigError(
                f"{name} (SpatiallyModulatedAttention) attends to one level, but detector.neck "
                f"({neck}) gives {num_levels}: use ScaleSelectiveModulatedAttention or set "
                "neck.num_levels=1"
            )


def _check_selection(detector: Detector) -> None:
    encoder, selection = detector.encoder, detector.selection
    if selection is None:
        return
    selector = f"detector.selection ({type(selection).__name__})"
    if not isinstance(encoder, TransformerEncoder):
        raise ConfigError(
            f"{selector} selects tokens, but {type(encoder).__name__} updates whole maps: "
            "remove the selection or use TransformerEncoder"
        )
    if detector.proposals is None:
        raise ConfigError(
            f"{selector} scores tokens through the transform of detector.proposals, which is not "
            "set: set it to a ProposalHead (without a head, if the queries select no proposals) or "
            "remove the selection"
        )
    if len(selection.layer_keep_ratios) != len(encoder.layers):
        raise ConfigError(
            f"selection.layer_keep_ratios has {len(selection.layer_keep_ratios)} entries for "
            f"{len(encoder.layers)} encoder.layers: give one for each layer"
        )
    for name, module in encoder.named_modules():
        if isinstance(module, EncoderAttention) and module.attends_whole_levels:
            raise ConfigError(
                f"encoder.{name} ({type(module).__name__}) needs every token of a level, but "
                f"{selector} selects some: remove the selection or use another attention"
            )


def _check_object_score(detector: Detector) -> None:
    """Object self-attention ranks tokens by the selection's scores and the proposals' classes."""
    encoder, queries = detector.encoder, detector.queries
    if not isinstance(encoder, TransformerEncoder) or not any(
        isinstance(layer, DualAttentionEncoderLayer) for layer in encoder.layers
    ):
        return
    if detector.selection is None or encoder.object_score is None:
        missing = "selection" if detector.selection is None else "encoder.object_score"
        raise ConfigError(
            f"encoder.layers holds DualAttentionEncoderLayer, which needs {missing}: "
            f"set {missing} or use EncoderLayer"
        )
    if not queries.needs_proposals:
        raise ConfigError(
            "encoder.layers holds DualAttentionEncoderLayer, which ranks tokens by the classes of "
            f"detector.proposals, but detector.queries ({type(queries).__name__}) leaves these "
            "untrained: use two-stage queries or EncoderLayer"
        )


def _check_proposals(detector: Detector) -> None:
    """Proposals predict if, and only if, queries are selected among them."""
    proposals, queries = detector.proposals, detector.queries
    source = f"detector.queries ({type(queries).__name__})"
    if proposals is None:
        if queries.needs_proposals:
            raise ConfigError(
                f"{source} selects among detector.proposals, which is not set: set it or use "
                "learned queries"
            )
        return
    name = f"detector.proposals ({type(proposals).__name__})"
    if queries.needs_proposals and proposals.head is None:
        raise ConfigError(
            f"{source} selects among proposals, but {name} has no head to make them: set "
            "proposals.head or use learned queries"
        )
    if not queries.needs_proposals and detector.selection is None:
        raise ConfigError(
            f"{name} is used by nothing: {source} selects no proposals, and there is no "
            "detector.selection: remove it or use two-stage queries"
        )
    if not queries.needs_proposals and proposals.head is not None:
        raise ConfigError(
            f"the head of {name} would not be trained, as {source} selects no proposals: set "
            "proposals.head=None or use two-stage queries"
        )


def _check_denoising(detector: Detector) -> None:
    """Denoising adds boxes to queries that have boxes and nothing else."""
    if detector.denoising is None:
        return
    source = f"detector.queries ({type(detector.queries).__name__})"
    denoising = f"detector.denoising ({type(detector.denoising).__name__})"
    if not detector.queries.gives_boxes:
        raise ConfigError(
            f"{denoising} adds reference boxes to those of the queries, but {source} gives none: "
            "use two-stage queries or remove denoising"
        )
    if not detector.decoder.query_position.needs_references:
        position = type(detector.decoder.query_position).__name__
        raise ConfigError(
            f"{denoising} makes queries without positions, but decoder.query_position ({position}) "
            "uses stored ones: use BoxQueryPosition or remove denoising"
        )


def _check_query_positions(detector: Detector) -> None:
    decoder, queries = detector.decoder, detector.queries
    source = f"detector.queries ({type(queries).__name__})"
    position = type(decoder.query_position).__name__
    if decoder.query_position.needs_references and not queries.gives_boxes:
        raise ConfigError(
            f"decoder.query_position ({position}) needs reference boxes, but {source} gives none: "
            "use two-stage queries or StoredQueryPosition"
        )
    if not decoder.query_position.needs_references and not queries.gives_positions:
        raise ConfigError(
            f"decoder.query_position ({position}) uses the positions of the queries, but {source} "
            "gives none: use BoxQueryPosition or other queries"
        )
    if decoder.query_position.needs_references and queries.gives_positions:
        raise ConfigError(
            f"decoder.query_position ({position}) makes positions from boxes, but {source} gives "
            "positions of its own: use StoredQueryPosition or queries without positions"
        )


def _check_references(detector: Detector) -> None:
    queries, attentions = detector.queries, _cross_attentions(detector)
    if queries.gives_references or any(first.predicts_references for _, first in attentions[:1]):
        return
    for name, attention in attentions:
        if attention.needs_references:
            raise ConfigError(
                f"{name} ({type(attention).__name__}) looks around references, but "
                f"detector.queries ({type(queries).__name__}) gives none: use queries with "
                "references, or an attention that predicts them in the first layer"
            )


def _check_center_predictions(detector: Detector) -> None:
    """Only the first layer is asked for references, and only if the queries have none."""
    queries = detector.queries
    for index, (name, attention) in enumerate(_cross_attentions(detector)):
        if not attention.predicts_references:
            continue
        attended = f"{name} ({type(attention).__name__})"
        if queries.gives_references:
            raise ConfigError(
                f"{attended} predicts references, but detector.queries "
                f"({type(queries).__name__}) gives them: set its center_prediction=None or use "
                "learned queries"
            )
        if index:
            raise ConfigError(
                f"{attended} predicts references, but the decoder "
                f"({type(detector.decoder).__name__}) asks its first layer only: set its "
                "center_prediction=None"
            )


def _cross_attentions(detector: Detector) -> list[tuple[str, DecoderAttention]]:
    """The cross-attention of each decoder layer, with its name."""
    layers = cast(Iterable[DecoderLayer], detector.decoder.layers)
    return [
        (f"decoder.layers.{index}.cross_attention", layer.cross_attention)
        for index, layer in enumerate(layers)
    ]


def _check_encoder_heads(detector: Detector) -> None:
    heads = detector.encoder_heads
    if heads is None:
        return
    if detector.proposals is None:
        raise ConfigError(
            f"detector.encoder_heads ({type(heads).__name__}) refines the boxes of "
            "detector.proposals, which is not set: set it or remove encoder_heads"
        )
    heads.check_selection(detector.selection)
