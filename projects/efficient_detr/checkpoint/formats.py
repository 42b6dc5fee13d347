"""Tables from published key layouts to ours, one a layout."""

from __future__ import annotations

from efficient_detr.checkpoint.conversion import KeyRule

_ATTENTION = r"(sampling_offsets|attention_weights)\."
_LAYER = r"layers\.(\d+)\."


def _deformable(prefix: str, ours: str) -> list[KeyRule]:
    """Rules for one deformable attention block; `prefix` holds one group, the layer number."""
    return [
        KeyRule(prefix + _ATTENTION, ours + r"\2."),
        KeyRule(prefix + r"value_proj\.", ours + "value_projection."),
        KeyRule(prefix + r"output_proj\.", ours + "output_projection."),
    ]


def _feedforward(prefix: str, ours: str) -> list[KeyRule]:
    return [
        KeyRule(prefix + r"ffns\.0\.layers\.0\.0\.", ours + "feedforward.expand."),
        KeyRule(prefix + r"ffns\.0\.layers\.1\.", ours + "feedforward.contract."),
    ]


_ENCODER, _OUR_ENCODER = r"transformer\.encoder\." + _LAYER, r"detector.encoder.layers.\1."
_DECODER, _OUR_DECODER = r"transformer\.decoder\." + _LAYER, r"detector.decoder.layers.\1."


def detrex(decoder_layers: int) -> list[KeyRule]:
    """detrex's layout of DINO and Focus-DETR (also that of Huawei's Focus-DETR repository).

    Args:
        decoder_layers: number of decoder layers; the prediction head after the last of them is the
            proposal head.
    """
    # Focus-DETR keeps object self-attention as attentions.0 and deformable attention as
    # attentions.1; DINO has deformable attention as attentions.0.
    return [
        KeyRule(r"backbone\.", "detector.backbone."),
        KeyRule(r"neck\.(convs|extra_convs)\.(\d+)\.conv\.", r"detector.neck.\1.\2."),
        KeyRule(r"neck\.(convs|extra_convs)\.(\d+)\.norm\.", r"detector.neck.\1.\2.norm."),
        KeyRule(r"transformer\.level_embeds", "detector.tokenizer.level_embedding"),
        KeyRule(r"transformer\.alpha", "detector.selection.modulation"),
        KeyRule(
            r"transformer\.enc_mask_predictor\.layer1\.0\.", "detector.selection.score_head.norm."
        ),
        KeyRule(
            r"transformer\.enc_mask_predictor\.layer1\.1\.",
            "detector.selection.score_head.project.",
        ),
        KeyRule(
            r"transformer\.enc_mask_predictor\.layer2\.0\.",
            "detector.selection.score_head.hidden.0.",
        ),
        KeyRule(
            r"transformer\.enc_mask_predictor\.layer2\.2\.",
            "detector.selection.score_head.hidden.1.",
        ),
        KeyRule(
            r"transformer\.enc_mask_predictor\.layer2\.4\.", "detector.selection.score_head.score."
        ),
        KeyRule(
            _ENCODER + r"attentions\.0\.attn\.",
            _OUR_ENCODER + "object_attention.attention.",
        ),
        KeyRule(_ENCODER + r"norm2\.", _OUR_ENCODER + "object_attention.norm."),
        *_deformable(_ENCODER + r"attentions\.[01]\.", _OUR_ENCODER + "attention."),
        *_feedforward(_ENCODER, _OUR_ENCODER),
        KeyRule(_ENCODER + r"norms\.0\.", _OUR_ENCODER + "attention_norm."),
        KeyRule(_ENCODER + r"norms\.1\.", _OUR_ENCODER + "feedforward_norm."),
        KeyRule(r"transformer\.enc_output_norm\.", "detector.proposals.norm."),
        KeyRule(r"transformer\.enc_output\.", "detector.proposals.projection."),
        KeyRule(r"transformer\.tgt_embed\.weight", "detector.queries.content"),
        KeyRule(r"label_enc\.", "detector.denoising.label_embedding."),
        KeyRule(_DECODER + r"attentions\.0\.attn\.", _OUR_DECODER + "self_attention."),
        *_deformable(_DECODER + r"attentions\.1\.", _OUR_DECODER + "cross_attention."),
        *_feedforward(_DECODER, _OUR_DECODER),
        KeyRule(_DECODER + r"norms\.0\.", _OUR_DECODER + "self_attention_norm."),
        KeyRule(_DECODER + r"norms\.1\.", _OUR_DECODER + "cross_attention_norm."),
        KeyRule(_DECODER + r"norms\.2\.", _OUR_DECODER + "feedforward_norm."),
        KeyRule(r"transformer\.decoder\.norm\.", "detector.decoder.norm."),
        KeyRule(
            r"transformer\.decoder\.ref_point_head\.",
            "detector.decoder.query_position.projection.",
        ),
        KeyRule(rf"class_embed\.{decoder_layers}\.", "detector.proposals.head.class_layer."),
        KeyRule(rf"bbox_embed\.{decoder_layers}\.", "detector.proposals.head.box_layers."),
        KeyRule(r"class_embed\.(\d+)\.", r"detector.decoder.heads.\1.class_layer."),
        KeyRule(r"bbox_embed\.(\d+)\.", r"detector.decoder.heads.\1.box_layers."),
        # The same tensors once more, under the modules that share them.
        KeyRule(r"transformer\.decoder\.(class|bbox)_embed\.", None),
        KeyRule(r"transformer\.encoder\.enhance_MCSP\.", None),
        KeyRule(r"enhance_MCSP_layerlist\.", None),
    ]
