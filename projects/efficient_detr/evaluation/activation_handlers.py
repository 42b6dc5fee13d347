"""How many activations one operator of a traced graph makes: outputs of convolutions and products.

This is what fvcore's ``ActivationCountAnalysis`` counts (Radosavovic et al., "On Network Design
Spaces for Visual Recognition"), and a measure of the memory that is moved. A fused operator counts
with what its written-out form would have made, attention weights included, so that fused and
written-out forms agree. Sampling makes none, since neither grid sampling nor embedding bags count.

Handlers are like those of :mod:`efficient_detr.evaluation.flop_handlers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from efficient_detr.evaluation.flop_handlers import (
    CONVOLUTIONS,
    FUSED_ATTENTIONS,
    MATRIX_PRODUCTS,
    MATRIX_PRODUCTS_PLUS,
    FlopHandler,
    tensor_shape,
)
from efficient_detr.ops import neighborhood_attention_library as neighborhood_attention


def _output(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    return prod(tensor_shape(outputs[0]))


def _einsum(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """With one operand nothing is multiplied."""
    operands = list(inputs[1].node().inputs())
    return _output(inputs, outputs) if len(operands) > 1 else 0


def _fused_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Scores (..., Lq, Lk) and the weighted sum (..., Lq, Dv)."""
    *rows, value_channels = tensor_shape(outputs[0])
    key_length = tensor_shape(inputs[2])[-2]
    return prod(rows) * (key_length + value_channels)


def _projected_attention(batch: int, queries: int, keys: int, channels: int, heads: int) -> int:
    """Query, key and value, scores, weighted sum and output."""
    return batch * ((3 * queries + 2 * keys) * channels + heads * queries * keys)


def _native_multi_head_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    batch, queries, channels = tensor_shape(inputs[0])
    keys, heads = tensor_shape(inputs[1])[1], inputs[4].toIValue()
    return _projected_attention(batch, queries, keys, channels, heads)


def _native_transformer_encoder_layer(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    batch, length, channels = tensor_shape(inputs[0])
    hidden, heads = tensor_shape(inputs[14])[0], inputs[2].toIValue()
    attention = _projected_attention(batch, length, length, channels, heads)
    return attention + batch * length * (hidden + channels)


def _hashing(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Points (B, H, N, D) projected to (B, H, N, T)."""
    return prod(tensor_shape(inputs[0])[:-1]) * tensor_shape(inputs[1])[1]


def _neighborhood_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Scores of k x k neighbours for each head, and the weighted sum.

    The last argument is the table of position biases (heads, 2k - 1, 2k - 1).
    """
    neighbours = ((tensor_shape(inputs[-1])[-1] + 1) // 2) ** 2
    *rows, channels = tensor_shape(outputs[0])  # (B, H, W, heads, D)
    return prod(rows) * (neighbours + channels)


ACTIVATION_HANDLERS: dict[str, FlopHandler] = {
    **dict.fromkeys((*CONVOLUTIONS, *MATRIX_PRODUCTS, *MATRIX_PRODUCTS_PLUS), _output),
    **dict.fromkeys(FUSED_ATTENTIONS, _fused_attention),
    "aten::addbmm": _output,
    "aten::einsum": _einsum,
    "aten::_native_multi_head_attention": _native_multi_head_attention,
    "aten::_transformer_encoder_layer_fwd": _native_transformer_encoder_layer,
    "efficient_detr::lsh_hash": _hashing,
    f"efficient_detr::{neighborhood_attention.NAME}": _neighborhood_attention,
}
"""Operator -> handler; every operator here has a FLOP handler as well."""
