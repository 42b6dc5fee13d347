"""Formats of detrex: DINO and Focus-DETR, also of Huawei's repository, DETR and Deformable DETR."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_detr.checkpoint.conversion import Copy, Drop, Rename, Row, below
from efficient_detr.checkpoint.heads import (
    PROPOSAL_HEAD,
    NumberedHeads,
    box_layers,
    class_layer,
    head_rows_of_file,
)
from efficient_detr.checkpoint.layout import (
    DETECTOR_CLASS_ROWS,
    CheckpointFormat,
    Shapes,
)
from efficient_detr.checkpoint.official import (
    DECODER_LAYER,
    ENCODER_LAYER,
    FIRST_ROW_DECIDES,
    OUR_DECODER_LAYER,
    OUR_ENCODER_LAYER,
    box_queries,
    deformable_attention,
    dense_attention,
    dino_decoder,
    proposal_features,
    refuse_efficient_detr,
    score_network,
)
from efficient_detr.checkpoint.resnet import torchvision_resnet
from efficient_detr.checkpoint.shapes import count_keys

_EMPTY_WEIGHT = "criterion.empty_weight"
_NO_OBJECT_WEIGHT = 0.1


# DETR --------------------------------------------------------------------------------------------


def _detr(backbone: list[Row]) -> list[Row]:
    return [
        *backbone,
        Rename("input_proj.*", "detector.neck.convs.0.*"),
        *dense_attention(ENCODER_LAYER + "attentions.0.attn.", OUR_ENCODER_LAYER + "attention."),
        *dense_attention(
            DECODER_LAYER + "attentions.1.attn.", OUR_DECODER_LAYER + "cross_attention."
        ),
        *_shared_by_all_layers(),
        Rename("transformer.decoder.post_norm_layer.*", "detector.decoder.norm.*"),
        Rename("query_embed.weight", "detector.queries.position"),
        class_layer("class_embed", "detector.decoder.heads.0."),
        box_layers("bbox_embed", "detector.decoder.heads.0."),
        Drop(_EMPTY_WEIGHT, "a constant of the loss", _class_weights),
    ]


def _class_weights(shapes: Shapes) -> Tensor:
    """The weight of each class in the loss; the last one is no object."""
    weights = torch.ones(shapes["class_embed.bias"])
    weights[-1] = _NO_OBJECT_WEIGHT
    return weights


def _detr_table(_: Shapes) -> list[Row]:
    return _detr([Rename("backbone.*", "detector.backbone.*")])


def _detr_dc5_table(_: Shapes) -> list[Row]:
    """With dilation the backbone is torchvision's."""
    return _detr(below(torchvision_resnet(), "backbone.body.", "detector.backbone."))


# Deformable attention ----------------------------------------------------------------------------


def _read_deformable(shapes: Shapes) -> list[Row]:
    return _deformable_table(_head_rows_of_file(shapes))


def _write_deformable(shapes: Shapes) -> list[Row]:
    refuse_efficient_detr(shapes, "detrex")
    return _deformable_table(NumberedHeads.of_model(shapes).rows())


def _deformable_table(heads: list[Row]) -> list[Row]:
    return [
        *heads,
        *_deformable_transformer(),
        *deformable_attention(ENCODER_LAYER + "attentions.0.", OUR_ENCODER_LAYER + "attention."),
        *box_queries("query_embedding.weight"),
    ]


def _read_dino(shapes: Shapes) -> list[Row]:
    objects = count_keys(shapes, ENCODER_LAYER + "attentions.0.attn.in_proj_weight")
    return _dino_table(_head_rows_of_file(shapes), objects)


def _write_dino(shapes: Shapes) -> list[Row]:
    objects = count_keys(shapes, OUR_ENCODER_LAYER + "object_attention.norm.weight")
    return _dino_table(NumberedHeads.of_model(shapes).rows(), objects)


def _dino_table(heads: list[Row], objects: int) -> list[Row]:
    """DINO, or Focus-DETR.

    Args:
        heads: rows of the prediction heads.
        objects: number of encoder layers in which object tokens attend to each other: Focus-DETR's.
            Those attentions come before the deformable ones.
    """
    focus: list[Row] = [
        Rename("transformer.alpha", "detector.selection.modulation"),
        *score_network(),
        *dense_attention(
            ENCODER_LAYER + "attentions.0.attn.",
            OUR_ENCODER_LAYER + "object_attention.attention.",
        ),
        Rename(ENCODER_LAYER + "norm2.*", OUR_ENCODER_LAYER + "object_attention.norm.*"),
        *(
            # Every encoder layer finds its objects with the class layer of the proposals.
            class_layer(f"{module}.{layer}", PROPOSAL_HEAD, Copy)
            for module in ("transformer.encoder.enhance_MCSP", "enhance_MCSP_layerlist")
            for layer in range(objects)
        ),
    ]
    return [
        *heads,
        *_deformable_transformer(),
        *(focus if objects else []),
        *deformable_attention(
            f"{ENCODER_LAYER}attentions.{1 if objects else 0}.", OUR_ENCODER_LAYER + "attention."
        ),
        *dino_decoder(),
    ]


def _head_rows_of_file(shapes: Shapes) -> list[Row]:
    return head_rows_of_file(shapes, DECODER_LAYER + "norms.0.weight")


def _deformable_transformer() -> list[Row]:
    """What Deformable DETR, DINO and Focus-DETR have in common."""
    return [
        Rename("backbone.*", "detector.backbone.*"),
        # The norm is inside our convolution, whose own weights have no further dot.
        Rename("neck.convs.{level}.norm.*", "detector.neck.convs.{level}.norm.*"),
        Rename("neck.convs.{level}.conv.*", "detector.neck.convs.{level}.*"),
        Rename("neck.extra_convs.{level}.norm.*", "detector.neck.extra_convs.{level}.norm.*"),
        Rename("neck.extra_convs.{level}.conv.*", "detector.neck.extra_convs.{level}.*"),
        Rename("transformer.level_embeds", "detector.tokenizer.level_embedding"),
        *deformable_attention(
            DECODER_LAYER + "attentions.1.", OUR_DECODER_LAYER + "cross_attention."
        ),
        *_shared_by_all_layers(),
        *proposal_features(),
    ]


def _shared_by_all_layers() -> list[Row]:
    """What all models name alike inside their layers; norms are in the order of execution."""
    decoder_norms = ("self_attention_norm", "cross_attention_norm", "feedforward_norm")
    return [
        Rename(ENCODER_LAYER + "norms.0.*", OUR_ENCODER_LAYER + "attention_norm.*"),
        Rename(ENCODER_LAYER + "norms.1.*", OUR_ENCODER_LAYER + "feedforward_norm.*"),
        *_feedforward(ENCODER_LAYER, OUR_ENCODER_LAYER),
        *dense_attention(
            DECODER_LAYER + "attentions.0.attn.", OUR_DECODER_LAYER + "self_attention."
        ),
        *(
            Rename(f"{DECODER_LAYER}norms.{number}.*", f"{OUR_DECODER_LAYER}{ours}.*")
            for number, ours in enumerate(decoder_norms)
        ),
        *_feedforward(DECODER_LAYER, OUR_DECODER_LAYER),
    ]


def _feedforward(theirs: str, ours: str) -> list[Row]:
    return [
        Rename(theirs + "ffns.0.layers.0.0.*", ours + "feedforward.expand.*"),
        Rename(theirs + "ffns.0.layers.1.*", ours + "feedforward.contract.*"),
    ]


# Formats -----------------------------------------------------------------------------------------

_FEEDFORWARD = ENCODER_LAYER + "ffns.0.layers.0.0.weight"
_DINO_QUERIES = "transformer.tgt_embed.weight"
_TORCHVISION_STEM = "backbone.body.conv1.weight"
_DETR_MARKS = (
    _FEEDFORWARD,
    DECODER_LAYER + "attentions.1.attn.in_proj_weight",
    "transformer.decoder.post_norm_layer.weight",
    "class_embed.weight",
)
_DEFORMABLE_MARKS = (_FEEDFORWARD, DECODER_LAYER + "attentions.1.sampling_offsets.weight")

FORMATS = (
    CheckpointFormat(
        name="detrex_dino",
        title="DINO or Focus-DETR of IDEA-Research/detrex",
        marks=(*_DEFORMABLE_MARKS, _DINO_QUERIES),
        read_table=_read_dino,
        write_table=_write_dino,
    ),
    CheckpointFormat(
        name="detrex_detr",
        title="DETR of IDEA-Research/detrex",
        marks=_DETR_MARKS,
        excluded=(_TORCHVISION_STEM,),
        no_object=True,
        read_table=_detr_table,
        write_table=_detr_table,
    ),
    CheckpointFormat(
        name="detrex_detr_dc5",
        title="DETR-DC5 of IDEA-Research/detrex",
        marks=(*_DETR_MARKS, _TORCHVISION_STEM),
        no_object=True,
        read_table=_detr_dc5_table,
        write_table=_detr_dc5_table,
    ),
    CheckpointFormat(
        name="detrex_deformable_detr",
        title="Deformable DETR of IDEA-Research/detrex",
        marks=_DEFORMABLE_MARKS,
        excluded=(_DINO_QUERIES,),
        read_table=_read_deformable,
        write_table=_write_deformable,
        class_rows=(FIRST_ROW_DECIDES, *DETECTOR_CLASS_ROWS),
    ),
)
"""Formats of detrex."""
