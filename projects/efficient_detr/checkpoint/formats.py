"""Tables from published key layouts to ours, one a layout."""

from __future__ import annotations

from efficient_detr.checkpoint.conversion import KeyRule
from efficient_detr.checkpoint.official import (
    DECODER_LAYER,
    ENCODER_LAYER,
    OUR_DECODER_LAYER,
    OUR_ENCODER_LAYER,
    deformable_attention,
    score_network,
)


def _feedforward(prefix: str, ours: str) -> list[KeyRule]:
    return [
        KeyRule(prefix + r"ffns\.0\.layers\.0\.0\.", ours + "feedforward.expand."),
        KeyRule(prefix + r"ffns\.0\.layers\.1\.", ours + "feedforward.contract."),
    ]


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
        *score_network(),
        KeyRule(
            ENCODER_LAYER + r"attentions\.0\.attn\.",
            OUR_ENCODER_LAYER + "object_attention.attention.",
        ),
        KeyRule(ENCODER_LAYER + r"norm2\.", OUR_ENCODER_LAYER + "object_attention.norm."),
        *deformable_attention(
            ENCODER_LAYER + r"attentions\.[01]\.", OUR_ENCODER_LAYER + "attention."
        ),
        *_feedforward(ENCODER_LAYER, OUR_ENCODER_LAYER),
        KeyRule(ENCODER_LAYER + r"norms\.0\.", OUR_ENCODER_LAYER + "attention_norm."),
        KeyRule(ENCODER_LAYER + r"norms\.1\.", OUR_ENCODER_LAYER + "feedforward_norm."),
        KeyRule(r"transformer\.enc_output_norm\.", "detector.proposals.norm."),
        KeyRule(r"transformer\.enc_output\.", "detector.proposals.projection."),
        KeyRule(r"transformer\.tgt_embed\.weight", "detector.queries.content"),
        KeyRule(r"label_enc\.", "detector.denoising.label_embedding."),
        KeyRule(DECODER_LAYER + r"attentions\.0\.attn\.", OUR_DECODER_LAYER + "self_attention."),
        *deformable_attention(
            DECODER_LAYER + r"attentions\.1\.", OUR_DECODER_LAYER + "cross_attention."
        ),
        *_feedforward(DECODER_LAYER, OUR_DECODER_LAYER),
        KeyRule(DECODER_LAYER + r"norms\.0\.", OUR_DECODER_LAYER + "self_attention_norm."),
        KeyRule(DECODER_LAYER + r"norms\.1\.", OUR_DECODER_LAYER + "cross_attention_norm."),
        KeyRule(DECODER_LAYER + r"norms\.2\.", OUR_DECODER_LAYER + "feedforward_norm."),
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
