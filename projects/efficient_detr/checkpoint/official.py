"""Tables from the key layouts of the official repositories to ours.

They cover facebookresearch/detr, fundamentalvision/Deformable-DETR and kakaobrain/sparse-detr,
whose transformers name their parts alike. A table renames everything behind the backbone. The keys
of the backbone itself, `backbone.0.body.`, are torchvision's and have no rule here.
"""

from __future__ import annotations

from efficient_detr.checkpoint.conversion import KeyRule

ENCODER_LAYER = r"transformer\.encoder\.layers\.(\d+)\."
DECODER_LAYER = r"transformer\.decoder\.layers\.(\d+)\."
OUR_ENCODER_LAYER = r"detector.encoder.layers.\1."
OUR_DECODER_LAYER = r"detector.decoder.layers.\1."


def detr() -> list[KeyRule]:
    """DETR, whichever backbone, with the norms after or before the branches of a layer."""
    return [
        KeyRule(ENCODER_LAYER + r"self_attn\.", OUR_ENCODER_LAYER + "attention."),
        KeyRule(DECODER_LAYER + r"multihead_attn\.", OUR_DECODER_LAYER + "cross_attention."),
        # In the order of execution: self-attention, cross-attention, feed-forward network.
        *_decoder_norms(self_attention=1, cross_attention=2, feedforward=3),
        *_shared_by_all_layers(),
        # Pre-norm only.
        KeyRule(r"transformer\.encoder\.norm\.", "detector.encoder.norm."),
        KeyRule(r"transformer\.decoder\.norm\.", "detector.decoder.norm."),
        KeyRule(r"class_embed\.", "detector.decoder.heads.0.class_layer."),
        KeyRule(r"bbox_embed\.", "detector.decoder.heads.0.box_layers."),
        KeyRule(r"query_embed\.weight", "detector.queries.position"),
        KeyRule(r"input_proj\.", "detector.neck.convs.0."),
    ]


def deformable_detr(*, num_maps: int, num_levels: int) -> list[KeyRule]:
    """Deformable DETR without refinement: one prediction head, stored once for each layer.

    Args:
        num_maps: number of backbone maps that the model uses; the first `input_proj` are theirs.
        num_levels: number of feature levels.
    """
    return [
        KeyRule(r"class_embed\.0\.", "detector.decoder.heads.0.class_layer."),
        KeyRule(r"bbox_embed\.0\.", "detector.decoder.heads.0.box_layers."),
        KeyRule(r"(class|bbox)_embed\.", None),
        *_deformable_transformer(num_maps, num_levels),
    ]


def deformable_detr_refine(*, num_maps: int, num_levels: int, decoder_layers: int) -> list[KeyRule]:
    """Deformable DETR with box refinement, with or without the second stage.

    Args:
        num_maps: number of backbone maps that the model uses.
        num_levels: number of feature levels.
        decoder_layers: number of decoder layers; the head after the last of theirs is the proposal
            head.
    """
    return [
        *_head(decoder_layers, "detector.proposals.head."),
        KeyRule(r"class_embed\.(\d+)\.", r"detector.decoder.heads.\1.class_layer."),
        KeyRule(r"bbox_embed\.(\d+)\.", r"detector.decoder.heads.\1.box_layers."),
        # The same heads once more, below the module that uses them.
        KeyRule(r"transformer\.decoder\.(class|bbox)_embed\.", None),
        *_deformable_transformer(num_maps, num_levels),
    ]


def sparse_detr(
    *, num_maps: int, num_levels: int, encoder_layers: int, decoder_layers: int
) -> list[KeyRule]:
    """Sparse DETR: the heads of the decoder, of the proposals, then of the encoder's layers.

    Args:
        num_maps: number of backbone maps that the model uses.
        num_levels: number of feature levels.
        encoder_layers: number of encoder layers; each but the last may have a head.
        decoder_layers: number of decoder layers.
    """
    encoder_heads = [
        rule
        for layer in range(encoder_layers - 1)
        for rule in _head(decoder_layers + 1 + layer, f"detector.encoder_heads.heads.{layer}.")
    ]
    return [
        *encoder_heads,
        KeyRule(r"transformer\.encoder\.(class|bbox)_embed\.", None),
        *score_network(),
        *deformable_detr_refine(
            num_maps=num_maps, num_levels=num_levels, decoder_layers=decoder_layers
        ),
    ]


def _deformable_transformer(num_maps: int, num_levels: int) -> list[KeyRule]:
    """Everything but the heads of Deformable DETR and Sparse DETR."""
    return [
        *deformable_attention(ENCODER_LAYER + r"self_attn\.", OUR_ENCODER_LAYER + "attention."),
        *deformable_attention(
            DECODER_LAYER + r"cross_attn\.", OUR_DECODER_LAYER + "cross_attention."
        ),
        # Numbered by their place in the constructor, not in the order of execution.
        *_decoder_norms(self_attention=2, cross_attention=1, feedforward=3),
        *_shared_by_all_layers(),
        KeyRule(r"transformer\.level_embed", "detector.tokenizer.level_embedding"),
        KeyRule(r"query_embed\.weight", "detector.queries.embedding"),
        KeyRule(r"transformer\.reference_points\.", "detector.queries.reference_points."),
        KeyRule(r"transformer\.pos_trans\.", "detector.queries.projection."),
        KeyRule(r"transformer\.pos_trans_norm\.", "detector.queries.norm."),
        KeyRule(r"transformer\.enc_output\.", "detector.proposals.projection."),
        KeyRule(r"transformer\.enc_output_norm\.", "detector.proposals.norm."),
        *_input_projections(num_maps, num_levels),
    ]


def deformable_attention(theirs: str, ours: str) -> list[KeyRule]:
    """One deformable attention; the pattern `theirs` holds one group, the number of the layer."""
    return [
        KeyRule(theirs + r"(sampling_offsets|attention_weights)\.", ours + r"\2."),
        KeyRule(theirs + r"(value|output)_proj\.", ours + r"\2_projection."),
    ]


def score_network() -> list[KeyRule]:
    """The network that scores tokens, the same in Sparse DETR and Focus-DETR."""
    theirs, ours = r"transformer\.enc_mask_predictor\.", "detector.selection.score_head."
    return [
        KeyRule(theirs + r"layer1\.0\.", ours + "norm."),
        KeyRule(theirs + r"layer1\.1\.", ours + "project."),
        KeyRule(theirs + r"layer2\.0\.", ours + "hidden.0."),
        KeyRule(theirs + r"layer2\.2\.", ours + "hidden.1."),
        KeyRule(theirs + r"layer2\.4\.", ours + "score."),
    ]


def _decoder_norms(*, self_attention: int, cross_attention: int, feedforward: int) -> list[KeyRule]:
    """The norms of a decoder layer, by the number that each has in the official layer."""
    return [
        KeyRule(
            rf"{DECODER_LAYER}norm{self_attention}\.", OUR_DECODER_LAYER + "self_attention_norm."
        ),
        KeyRule(
            rf"{DECODER_LAYER}norm{cross_attention}\.", OUR_DECODER_LAYER + "cross_attention_norm."
        ),
        KeyRule(rf"{DECODER_LAYER}norm{feedforward}\.", OUR_DECODER_LAYER + "feedforward_norm."),
    ]


def _shared_by_all_layers() -> list[KeyRule]:
    """What DETR and Deformable DETR name alike inside their layers."""
    return [
        KeyRule(DECODER_LAYER + r"self_attn\.", OUR_DECODER_LAYER + "self_attention."),
        KeyRule(ENCODER_LAYER + r"norm1\.", OUR_ENCODER_LAYER + "attention_norm."),
        KeyRule(ENCODER_LAYER + r"norm2\.", OUR_ENCODER_LAYER + "feedforward_norm."),
        KeyRule(ENCODER_LAYER + r"linear1\.", OUR_ENCODER_LAYER + "feedforward.expand."),
        KeyRule(ENCODER_LAYER + r"linear2\.", OUR_ENCODER_LAYER + "feedforward.contract."),
        KeyRule(DECODER_LAYER + r"linear1\.", OUR_DECODER_LAYER + "feedforward.expand."),
        KeyRule(DECODER_LAYER + r"linear2\.", OUR_DECODER_LAYER + "feedforward.contract."),
    ]


def _head(number: int, ours: str) -> list[KeyRule]:
    """One of the numbered heads."""
    return [
        KeyRule(rf"class_embed\.{number}\.", ours + "class_layer."),
        KeyRule(rf"bbox_embed\.{number}\.", ours + "box_layers."),
    ]


def _input_projections(num_maps: int, num_levels: int) -> list[KeyRule]:
    """Convolution and norm of each level: those of backbone maps first, then the extra levels."""
    rules = []
    for level in range(num_levels):
        ours = f"convs.{level}" if level < num_maps else f"extra_convs.{level - num_maps}"
        rules += [
            KeyRule(rf"input_proj\.{level}\.0\.", f"detector.neck.{ours}."),
            KeyRule(rf"input_proj\.{level}\.1\.", f"detector.neck.{ours}.norm."),
        ]
    return rules
