"""Checkpoint formats of Hugging Face's `transformers`: DETR and Deformable DETR.

Releases 4 and 5 name some modules differently. Files on the Hub have the names of release 4, which
release 5 reads and saves as well; its own names are those of a model's `state_dict()`. Both keep
query, key and value projections apart. The backbone has torchvision's names if timm built it, and
others if `transformers` did (`use_timm_backbone=False`): both are read, the former are written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

from efficient_detr.checkpoint.conversion import (
    Copy,
    Drop,
    Packed,
    Rename,
    Row,
    below,
)
from efficient_detr.checkpoint.heads import (
    NumberedHeads,
    box_layers,
    class_layer,
    head_rows_of_file,
)
from efficient_detr.checkpoint.layout import DETECTOR_CLASS_ROWS, CheckpointFormat, Shapes
from efficient_detr.checkpoint.official import (
    FIRST_ROW_DECIDES,
    OUR_DECODER_LAYER,
    OUR_ENCODER_LAYER,
    box_queries,
    deformable_attention,
    input_projections,
    levels_of_file,
    levels_of_model,
    proposal_features,
    refuse_efficient_detr,
)
from efficient_detr.checkpoint.resnet import torchvision_resnet

_ENCODER_LAYER = "model.encoder.layers.{layer}."
_DECODER_LAYER = "model.decoder.layers.{layer}."
_INPUT_PROJECTIONS = "model.input_proj."
_ONLY_HEAD = "detector.decoder.heads.0."


@dataclass(frozen=True)
class _Release:
    """What a release of the library calls its modules.

    Attributes:
        backbone: where the weights of the backbone are.
        output: the last layer of an attention that is not deformable.
        feedforward: the two layers of a feed-forward network, without their numbers.
    """

    backbone: str
    output: str
    feedforward: str


_RELEASE_4 = _Release("model.backbone.conv_encoder.model.", "out_proj.", "fc")
_RELEASE_5 = _Release("model.backbone.model.", "o_proj.", "mlp.fc")


# Parts of both detectors -------------------------------------------------------------------------


def huggingface_resnet() -> list[Row]:
    """A ResNet that `transformers` built; names on both sides are relative to the backbone."""
    rows = _normed_convolution("embedder.embedder.", "stem.conv1.")
    for stage in range(4):
        theirs, ours = f"encoder.stages.{stage}.layers.{{block}}.", f"res{stage + 2}.{{block}}."
        rows += _normed_convolution(theirs + "shortcut.", ours + "shortcut.")
        for index in range(3):
            rows += _normed_convolution(f"{theirs}layer.{index}.", f"{ours}conv{index + 1}.")
    return rows


def _normed_convolution(theirs: str, ours: str) -> list[Row]:
    return [
        Drop(theirs + "normalization.num_batches_tracked", "counts batches of training"),
        Rename(theirs + "convolution.weight", ours + "weight"),
        Rename(theirs + "normalization.*", ours + "norm.*"),
    ]


def _both(release: _Release) -> list[Row]:
    """The backbone, and what the layers of DETR and Deformable DETR have in common."""
    return [
        *below(torchvision_resnet(), release.backbone, "detector.backbone."),
        *below(huggingface_resnet(), release.backbone, "detector.backbone."),
        *_feedforward(release, _ENCODER_LAYER, OUR_ENCODER_LAYER),
        *_feedforward(release, _DECODER_LAYER, OUR_DECODER_LAYER),
        *_attention(release, _DECODER_LAYER + "self_attn.", OUR_DECODER_LAYER + "self_attention."),
        Rename(_ENCODER_LAYER + "self_attn_layer_norm.*", OUR_ENCODER_LAYER + "attention_norm.*"),
        Rename(
            _DECODER_LAYER + "self_attn_layer_norm.*", OUR_DECODER_LAYER + "self_attention_norm.*"
        ),
        Rename(
            _DECODER_LAYER + "encoder_attn_layer_norm.*",
            OUR_DECODER_LAYER + "cross_attention_norm.*",
        ),
    ]


def _feedforward(release: _Release, theirs: str, ours: str) -> list[Row]:
    """The feed-forward network of a layer, and its norm."""
    return [
        Rename(f"{theirs}{release.feedforward}1.*", ours + "feedforward.expand.*"),
        Rename(f"{theirs}{release.feedforward}2.*", ours + "feedforward.contract.*"),
        Rename(theirs + "final_layer_norm.*", ours + "feedforward_norm.*"),
    ]


def _attention(release: _Release, theirs: str, ours: str) -> list[Row]:
    """An attention that is not deformable."""
    packed = [
        Packed(tuple(f"{theirs}{letter}_proj.{kind}" for letter in "qkv"), f"{ours}in_proj_{kind}")
        for kind in ("weight", "bias")
    ]
    return [*packed, Rename(theirs + release.output + "*", ours + "out_proj.*")]


# DETR --------------------------------------------------------------------------------------------


def _detr(release: _Release) -> list[Row]:
    """DETR, whichever ResNet."""
    return [
        *_both(release),
        *_attention(release, _ENCODER_LAYER + "self_attn.", OUR_ENCODER_LAYER + "attention."),
        *_attention(
            release, _DECODER_LAYER + "encoder_attn.", OUR_DECODER_LAYER + "cross_attention."
        ),
        Rename("model.decoder.layernorm.*", "detector.decoder.norm.*"),
        Rename("model.input_projection.*", "detector.neck.convs.0.*"),
        Rename("model.query_position_embeddings.weight", "detector.queries.position"),
        class_layer("class_labels_classifier", _ONLY_HEAD),
        box_layers("bbox_predictor", _ONLY_HEAD),
    ]


# Deformable DETR ---------------------------------------------------------------------------------


def _read_deformable(release: _Release, shapes: Shapes) -> list[Row]:
    return [
        *head_rows_of_file(shapes, _DECODER_LAYER + "final_layer_norm.weight", "model."),
        *_deformable_detr(release, *levels_of_file(shapes, _INPUT_PROJECTIONS)),
    ]


def _write_deformable(release: _Release, shapes: Shapes) -> list[Row]:
    refuse_efficient_detr(shapes, "transformers")
    heads = NumberedHeads.of_model(shapes).rows()
    return [*_renamed_official(heads), *_deformable_detr(release, *levels_of_model(shapes))]


def _deformable_detr(release: _Release, maps: int, levels: int) -> list[Row]:
    """Everything but the heads.

    Args:
        release: of the library.
        maps: number of backbone maps; the first levels are made of them.
        levels: number of feature levels.
    """
    return [
        *_both(release),
        *deformable_attention(_ENCODER_LAYER + "self_attn.", OUR_ENCODER_LAYER + "attention."),
        *deformable_attention(
            _DECODER_LAYER + "encoder_attn.", OUR_DECODER_LAYER + "cross_attention."
        ),
        *input_projections(_INPUT_PROJECTIONS, maps, levels),
        Rename("model.level_embed", "detector.tokenizer.level_embedding"),
        *_renamed_official(
            [*box_queries("model.query_position_embeddings.weight"), *proposal_features()]
        ),
    ]


def _renamed_official(rows: Iterable[Row]) -> list[Rename | Copy]:
    """Rows of the official layout, whose transformer is the model here."""
    return [
        replace(row, theirs=row.theirs.replace("transformer.", "model."))
        for row in rows
        if isinstance(row, Rename | Copy)
    ]


# Formats -----------------------------------------------------------------------------------------


def _formats(release: _Release, suffix: str, names: str) -> tuple[CheckpointFormat, ...]:
    feedforward = f"{_DECODER_LAYER}{release.feedforward}1.weight"
    detr = _detr(release)
    return (
        CheckpointFormat(
            name="huggingface_detr" + suffix,
            title=f"DETR of Hugging Face transformers, with names of {names}",
            marks=(
                feedforward,
                _DECODER_LAYER + "encoder_attn.q_proj.weight",
                "class_labels_classifier.weight",
            ),
            no_object=True,
            read_table=lambda _: detr,
            write_table=lambda _: detr,
        ),
        CheckpointFormat(
            name="huggingface_deformable_detr" + suffix,
            title=f"Deformable DETR of Hugging Face transformers, with names of {names}",
            marks=(
                feedforward,
                _DECODER_LAYER + "encoder_attn.sampling_offsets.weight",
                "model.level_embed",
            ),
            read_table=partial(_read_deformable, release),
            write_table=partial(_write_deformable, release),
            class_rows=(FIRST_ROW_DECIDES, *DETECTOR_CLASS_ROWS),
        ),
    )


FORMATS = (
    *_formats(_RELEASE_4, "", "release 4 and the Hub"),
    *_formats(_RELEASE_5, "_v5", "release 5"),
)
"""Formats of Hugging Face."""
