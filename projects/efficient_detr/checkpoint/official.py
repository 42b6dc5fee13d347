"""Formats of the repositories in which DETR, Deformable DETR, Sparse DETR and DINO were published.

Their transformers name their parts alike. Numbers of feature levels, layers and heads are read from
the shapes of the weights. ACT, which clusters the tokens of DETR, has DETR's weights.
"""

from __future__ import annotations

from efficient_detr.checkpoint.conversion import Copy, Drop, Rename, Row, below, matches_template
from efficient_detr.checkpoint.heads import (
    PROPOSAL_HEAD,
    NumberedHeads,
    box_layers,
    class_layer,
    head_rows_of_file,
    spread_over_layers,
)
from efficient_detr.checkpoint.layout import (
    DETECTOR_CLASS_ROWS,
    CheckpointFormat,
    ClassRows,
    Shapes,
)
from efficient_detr.checkpoint.resnet import torchvision_resnet
from efficient_detr.checkpoint.shapes import count_keys, inside
from efficient_detr.checkpoint.swin import SWIN_OUTPUT_NORMS, swin_backbone, swin_from_ours

ENCODER_LAYER = "transformer.encoder.layers.{layer}."
DECODER_LAYER = "transformer.decoder.layers.{layer}."
OUR_ENCODER_LAYER = "detector.encoder.layers.{layer}."
OUR_DECODER_LAYER = "detector.decoder.layers.{layer}."

_BACKBONE = "backbone.0."
_BODY = "backbone.0.body."
_OUR_BACKBONE = "detector.backbone."


def official_backbone() -> list[Row]:
    """A ResNet where the official repositories have it."""
    return below(torchvision_resnet(), _BODY, _OUR_BACKBONE)


def _read_backbone(swin: str) -> list[Row]:
    """A ResNet, or a Swin at the place that a repository gives it."""
    rows = [*swin_backbone({}), *SWIN_OUTPUT_NORMS]
    return [*official_backbone(), *below(rows, swin, _OUR_BACKBONE)]


def _write_backbone(shapes: Shapes, swin: str) -> list[Row]:
    """The same for a model of ours. Detectors do not store the masks of shifted windows."""
    rows = swin_from_ours(inside(shapes, _OUR_BACKBONE))
    stored = [row for row in rows if not str(row.theirs).endswith("attn_mask")]
    return [*official_backbone(), *below(stored, swin, _OUR_BACKBONE)]


# DETR --------------------------------------------------------------------------------------------


def detr() -> list[Row]:
    """DETR behind the backbone, with the norms after or before the branches of a layer."""
    return [
        *dense_attention(ENCODER_LAYER + "self_attn.", OUR_ENCODER_LAYER + "attention."),
        *dense_attention(DECODER_LAYER + "multihead_attn.", OUR_DECODER_LAYER + "cross_attention."),
        # In the order of execution: self-attention, cross-attention, feed-forward network.
        *_decoder_norms(self_attention=1, cross_attention=2, feedforward=3),
        *_shared_by_all_layers(),
        # Pre-norm only.
        Rename("transformer.encoder.norm.*", "detector.encoder.norm.*"),
        Rename("transformer.decoder.norm.*", "detector.decoder.norm.*"),
        class_layer("class_embed", "detector.decoder.heads.0."),
        box_layers("bbox_embed", "detector.decoder.heads.0."),
        Rename("query_embed.weight", "detector.queries.position"),
        Rename("input_proj.*", "detector.neck.convs.0.*"),
    ]


def _detr_table(_: Shapes) -> list[Row]:
    return [*official_backbone(), *detr()]


def _detectron2_table(_: Shapes) -> list[Row]:
    """DETR inside its wrapper for Detectron2, with a backbone of Detectron2's."""
    return [
        Rename("detr.backbone.0.backbone.*", "detector.backbone.*"),
        *below(detr(), "detr.", ""),
        Drop("criterion.empty_weight", "a constant of the loss"),
    ]


def dense_attention(theirs: str, ours: str) -> list[Row]:
    """One attention of PyTorch's, below templates that end in a dot, without further parts."""
    return [
        Rename(f"{theirs}{part}", f"{ours}{part}")
        for part in ("in_proj_weight", "in_proj_bias", "out_proj.*")
    ]


# Deformable attention ----------------------------------------------------------------------------


def _read_deformable(shapes: Shapes) -> list[Row]:
    heads = head_rows_of_file(shapes, DECODER_LAYER + "norm1.weight")
    return [*_read_backbone(_BODY), *_deformable_rows(heads, *levels_of_file(shapes))]


def _write_deformable(shapes: Shapes) -> list[Row]:
    heads = NumberedHeads.of_model(shapes).rows()
    rows = _deformable_rows(heads, *levels_of_model(shapes))
    return [*_write_backbone(shapes, _BODY), *rows]


def _deformable_rows(heads: list[Row], maps: int, levels: int) -> list[Row]:
    """Deformable DETR in all its stages, and Sparse DETR."""
    return [
        *heads,
        *score_network(),
        *_deformable_transformer(maps, levels),
        *box_queries("query_embed.weight"),
    ]


def box_queries(embedding: str) -> list[Row]:
    """Queries of Deformable DETR: an embedding of their own, or made of the proposals' boxes."""
    return [
        Rename(embedding, "detector.queries.embedding"),
        Rename("transformer.reference_points.*", "detector.queries.reference_points.*"),
        Rename("transformer.pos_trans.*", "detector.queries.projection.*"),
        Rename("transformer.pos_trans_norm.*", "detector.queries.norm.*"),
    ]


def _read_dino(shapes: Shapes) -> list[Row]:
    layers = count_keys(shapes, DECODER_LAYER + "norm1.weight")
    return [
        *_read_backbone(_BACKBONE),
        *_shared_dino_heads(shapes, layers),
        *_dino_rows(*levels_of_file(shapes)),
    ]


def _write_dino(shapes: Shapes) -> list[Row]:
    return [*_write_backbone(shapes, _BACKBONE), *_dino_rows(*levels_of_model(shapes))]


def _shared_dino_heads(shapes: Shapes, layers: int) -> list[Row]:
    """Rows for a head that a file without duplicates has as that of one layer."""
    rows: list[Row] = []
    for name, row_of, ours in (
        ("class_embed", class_layer, "class_layer.*"),
        ("bbox_embed", box_layers, "box_layers.*"),
    ):
        numbered = [f"{place}{name}." for place in ("", "transformer.decoder.")]
        stored = {
            p + key[len(p) :].partition(".")[0]
            for key in shapes
            for p in numbered
            if key.startswith(p)
        }
        if len({head.rpartition(".")[2] for head in stored}) == 1:
            # Where it is stored at both places, the other one is compared as a copy.
            row = row_of(min(stored), "detector.decoder.heads.0.")
            rows += spread_over_layers([row], ours, layers)
    return rows


def _dino_rows(maps: int, levels: int) -> list[Row]:
    """DINO. The published models have one head, stored for each decoder layer and twice at that.

    The official code can also have a head for each layer, under the same keys: then it needs
    `dec_pred_class_embed_share` and `dec_pred_bbox_embed_share` to be False.
    """
    ours = "detector.decoder.heads.{layer}."
    return [
        class_layer("class_embed.{layer}", ours),
        box_layers("bbox_embed.{layer}", ours),
        class_layer("transformer.decoder.class_embed.{layer}", ours, Copy),
        box_layers("transformer.decoder.bbox_embed.{layer}", ours, Copy),
        class_layer("transformer.enc_out_class_embed", PROPOSAL_HEAD),
        box_layers("transformer.enc_out_bbox_embed", PROPOSAL_HEAD),
        *_deformable_transformer(maps, levels),
        *dino_decoder(),
    ]


def dino_decoder() -> list[Row]:
    """What DINO adds to a Deformable DETR, under the names that all repositories give it."""
    return [
        Rename("transformer.tgt_embed.weight", "detector.queries.content"),
        Rename("transformer.decoder.norm.*", "detector.decoder.norm.*"),
        Rename(
            "transformer.decoder.ref_point_head.*", "detector.decoder.query_position.projection.*"
        ),
        Rename("label_enc.*", "detector.denoising.label_embedding.*"),
    ]


def _deformable_transformer(maps: int, levels: int) -> list[Row]:
    """Everything between the backbone and the heads, apart from queries.

    Args:
        maps: number of backbone maps; the first levels are made of them.
        levels: number of feature levels.
    """
    return [
        *deformable_attention(ENCODER_LAYER + "self_attn.", OUR_ENCODER_LAYER + "attention."),
        *deformable_attention(
            DECODER_LAYER + "cross_attn.", OUR_DECODER_LAYER + "cross_attention."
        ),
        # Numbered by their place in the constructor, not in the order of execution.
        *_decoder_norms(self_attention=2, cross_attention=1, feedforward=3),
        *_shared_by_all_layers(),
        Rename("transformer.level_embed", "detector.tokenizer.level_embedding"),
        *proposal_features(),
        *input_projections("input_proj.", maps, levels),
    ]


def deformable_attention(theirs: str, ours: str) -> list[Row]:
    """One deformable attention, below templates that end in a dot."""
    return [
        Rename(f"{theirs}sampling_offsets.*", f"{ours}sampling_offsets.*"),
        Rename(f"{theirs}attention_weights.*", f"{ours}attention_weights.*"),
        Rename(f"{theirs}value_proj.*", f"{ours}value_projection.*"),
        Rename(f"{theirs}output_proj.*", f"{ours}output_projection.*"),
    ]


def proposal_features() -> list[Row]:
    """What tokens go through before they are proposals."""
    return [
        Rename("transformer.enc_output.*", "detector.proposals.projection.*"),
        Rename("transformer.enc_output_norm.*", "detector.proposals.norm.*"),
    ]


def score_network() -> list[Row]:
    """The network that scores tokens, the same in Sparse DETR and Focus-DETR."""
    rows: list[Row] = [
        Rename("layer1.0.*", "norm.*"),
        Rename("layer1.1.*", "project.*"),
        Rename("layer2.0.*", "hidden.0.*"),
        Rename("layer2.2.*", "hidden.1.*"),
        Rename("layer2.4.*", "score.*"),
    ]
    return below(rows, "transformer.enc_mask_predictor.", "detector.selection.score_head.")


def _decoder_norms(*, self_attention: int, cross_attention: int, feedforward: int) -> list[Row]:
    """The norms of a decoder layer, by the number that each has in the official layer."""
    return [
        Rename(f"{DECODER_LAYER}norm{number}.*", f"{OUR_DECODER_LAYER}{ours}.*")
        for ours, number in (
            ("self_attention_norm", self_attention),
            ("cross_attention_norm", cross_attention),
            ("feedforward_norm", feedforward),
        )
    ]


def _shared_by_all_layers() -> list[Row]:
    """What DETR and Deformable DETR name alike inside their layers."""
    return [
        *dense_attention(DECODER_LAYER + "self_attn.", OUR_DECODER_LAYER + "self_attention."),
        Rename(ENCODER_LAYER + "norm1.*", OUR_ENCODER_LAYER + "attention_norm.*"),
        Rename(ENCODER_LAYER + "norm2.*", OUR_ENCODER_LAYER + "feedforward_norm.*"),
        Rename(ENCODER_LAYER + "linear1.*", OUR_ENCODER_LAYER + "feedforward.expand.*"),
        Rename(ENCODER_LAYER + "linear2.*", OUR_ENCODER_LAYER + "feedforward.contract.*"),
        Rename(DECODER_LAYER + "linear1.*", OUR_DECODER_LAYER + "feedforward.expand.*"),
        Rename(DECODER_LAYER + "linear2.*", OUR_DECODER_LAYER + "feedforward.contract.*"),
    ]


def input_projections(theirs: str, maps: int, levels: int) -> list[Row]:
    """Convolution and norm of each level: those of backbone maps first, then further levels.

    Args:
        theirs: what comes before the number of the level.
        maps: number of backbone maps.
        levels: number of feature levels.
    """
    rows: list[Row] = []
    for level in range(levels):
        ours = f"convs.{level}" if level < maps else f"extra_convs.{level - maps}"
        # The norm is inside our convolution, whose own weights have no further dot.
        rows += [
            Rename(f"{theirs}{level}.1.*", f"detector.neck.{ours}.norm.*"),
            Rename(f"{theirs}{level}.0.*", f"detector.neck.{ours}.*"),
        ]
    return rows


def levels_of_file(shapes: Shapes, theirs: str = "input_proj.") -> tuple[int, int]:
    """Numbers of backbone maps and of feature levels.

    Args:
        shapes: of the file, in which levels beyond the maps come from 3x3 convolutions.
        theirs: what comes before the number of the level.
    """
    convolution = f"{theirs}{{level}}.0.weight"
    kernels = [shape[-1] for key, shape in shapes.items() if matches_template(convolution, key)]
    return kernels.count(1), len(kernels)


def levels_of_model(shapes: Shapes) -> tuple[int, int]:
    """The same for a model of ours."""
    maps = count_keys(shapes, "detector.neck.convs.{level}.weight")
    return maps, maps + count_keys(shapes, "detector.neck.extra_convs.{level}.weight")


# Formats -----------------------------------------------------------------------------------------

_SCORE_NETWORK = "transformer.enc_mask_predictor.*"
_DINO_QUERIES = "transformer.tgt_embed.weight"
_DEFORMABLE_MARKS = (
    ENCODER_LAYER + "self_attn.sampling_offsets.weight",
    DECODER_LAYER + "cross_attn.sampling_offsets.weight",
)


def _embeds_boxes_as_content(shapes: Shapes) -> bool:
    """Whether queries take position and content from boxes, as in Deformable DETR.

    In Efficient DETR, whose keys are the same, they take their position alone.
    """
    projection = shapes.get("detector.queries.projection.weight")
    return projection is None or projection[0] == projection[1]


def refuse_efficient_detr(shapes: Shapes, library: str) -> None:
    """Stop the writing of a model of ours that a library lacks.

    Raises:
        ValueError: for Efficient DETR.
    """
    if not _embeds_boxes_as_content(shapes):
        raise ValueError(f"{library} has no Efficient DETR")


FIRST_ROW_DECIDES = ClassRows(
    PROPOSAL_HEAD + "class_layer.*", in_order=True, applies=_embeds_boxes_as_content
)
"""Deformable DETR ranks proposals by the first row, whatever class it is; Efficient DETR by all."""


FORMATS = (
    CheckpointFormat(
        name="detr",
        title="DETR of facebookresearch/detr",
        marks=(
            ENCODER_LAYER + "self_attn.in_proj_weight",
            DECODER_LAYER + "multihead_attn.in_proj_weight",
            "class_embed.weight",
            "query_embed.weight",
        ),
        # SMCA is DETR with more in its decoder.
        excluded=(DECODER_LAYER + "point1.*",),
        no_object=True,
        read_table=_detr_table,
        write_table=_detr_table,
    ),
    CheckpointFormat(
        name="detr_detectron2",
        title="DETR in the Detectron2 wrapper of facebookresearch/detr",
        marks=(
            f"detr.{DECODER_LAYER}multihead_attn.in_proj_weight",
            "detr.class_embed.weight",
            "detr.query_embed.weight",
        ),
        no_object=True,
        read_table=_detectron2_table,
        write_table=_detectron2_table,
    ),
    CheckpointFormat(
        name="deformable_detr",
        title="Deformable DETR of fundamentalvision/Deformable-DETR",
        marks=_DEFORMABLE_MARKS,
        excluded=(_SCORE_NETWORK, _DINO_QUERIES),
        read_table=_read_deformable,
        write_table=_write_deformable,
        class_rows=(FIRST_ROW_DECIDES, *DETECTOR_CLASS_ROWS),
    ),
    CheckpointFormat(
        name="sparse_detr",
        title="Sparse DETR of kakaobrain/sparse-detr",
        marks=(*_DEFORMABLE_MARKS, _SCORE_NETWORK),
        read_table=_read_deformable,
        write_table=_write_deformable,
    ),
    CheckpointFormat(
        name="dino",
        title="DINO of IDEA-Research/DINO",
        marks=(*_DEFORMABLE_MARKS, _DINO_QUERIES, "transformer.enc_out_class_embed.weight"),
        excluded=(_SCORE_NETWORK,),
        read_table=_read_dino,
        write_table=_write_dino,
        # One more than the classes, for a label that is not there.
        class_rows=(
            ClassRows("detector.denoising.label_embedding.*", unused=1),
            *DETECTOR_CLASS_ROWS,
        ),
    ),
)
"""Formats of the official repositories."""
