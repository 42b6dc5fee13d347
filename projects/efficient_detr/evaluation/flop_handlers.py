"""How many multiply-adds one operator of a traced graph costs.

fvcore counts a model by tracing it and asking one handler per operator. Its own table misses every
fused attention operator, so that replacing a written-out attention by a fused one makes a model
look cheaper than it is. This table is complete for the operators that the models of this project
use, and a fused operator always costs what its written-out form costs.

One multiply-add counts as 1. Norms, interpolation and grid sampling cost what fvcore charges for
them (5 per element of an affine norm, 4 per bilinear output), which keeps the numbers comparable
with published ones.

A handler receives the inputs and outputs of one node of the graph as
``torch._C.Value`` objects; shapes and constants are recorded in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from fvcore.nn.jit_handles import batchnorm_flop_jit, elementwise_flop_counter, norm_flop_counter

from efficient_detr.ops import deformable_attention_library as deformable_attention
from efficient_detr.ops import lsh_clustering_library as lsh_clustering
from efficient_detr.ops import neighborhood_attention_library as neighborhood_attention

# Interpolation modes of aten::grid_sampler; 0 is bilinear.
_NEAREST = 1
_BICUBIC = 2

FlopHandler = Callable[[Sequence[Any], Sequence[Any]], int | None]
"""``handler(inputs, outputs) -> multiply-adds``; both arguments hold ``torch._C.Value`` objects.

None instead of a number means that the call is to be listed as seen but not counted.
"""


def tensor_shape(value: Any) -> list[int]:
    """Shape of a traced tensor.

    Args:
        value: a ``torch._C.Value`` of the graph.

    Returns:
        The sizes, ``[]`` for a scalar tensor.

    Raises:
        ValueError: the value is no tensor, or the trace did not record its shape.
    """
    if not value.isCompleteTensor():
        producer = value.node().kind()
        raise ValueError(f"The trace has no tensor shape for a value made by {producer}.")
    return list(value.type().sizes())


def is_given(value: Any) -> bool:
    """True when an optional tensor argument of an operator is not None."""
    return bool(value.isCompleteTensor())


def _matrix_product(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Every element of the output sums over the last dimension of the first factor."""
    return prod(tensor_shape(outputs[0])) * tensor_shape(inputs[0])[-1]


def _matrix_product_plus(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Matrix product added to the first argument (addmm, addmv, baddbmm)."""
    return _matrix_product(inputs[1:], outputs)


def _summed_batch_product(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """addbmm: a batch of products, summed over the batch."""
    return prod(tensor_shape(inputs[1])) * tensor_shape(inputs[2])[-1]


def _convolution(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """One kernel application per output position (per input position when transposed).

    The weight is (out, in / groups, *kernel), or (in, out / groups, *kernel) when transposed.
    """
    transposed = len(inputs) > 7 and bool(inputs[6].toIValue())
    anchor = inputs[0] if transposed else outputs[0]
    return prod(tensor_shape(anchor)) * prod(tensor_shape(inputs[1])[1:])


def _einsum(inputs: Sequence[Any], outputs: Sequence[Any]) -> int | None:
    """Einstein sum of at most two tensors: one multiply-add per combination of all its indices."""
    equation = inputs[0].toIValue().replace(" ", "")
    terms = equation.split("->")[0].split(",")
    operands = [tensor_shape(value) for value in inputs[1].node().inputs()]
    if len(operands) == 1:
        return None  # a transposition or a sum; nothing is multiplied
    if len(operands) > 2:
        raise ValueError(
            f"einsum '{equation}' has {len(operands)} operands, and its cost depends on the order "
            "in which they are contracted; write it as products of two."
        )
    return prod(tensor_shape(outputs[0])) * _contracted_size(equation, terms, operands)


def _contracted_size(equation: str, terms: list[str], operands: list[list[int]]) -> int:
    """Product of the sizes of the indices that an einsum sums over."""
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, operands, strict=True):
        before, _, after = term.partition("...")
        for letter, size in [
            *zip(before, shape, strict=False),
            *zip(reversed(after), reversed(shape), strict=False),
        ]:
            sizes[letter] = max(size, sizes.get(letter, 1))
    if "->" in equation:
        kept = set(equation.split("->")[1])
    else:  # without an explicit output, indices that occur once are kept
        written = "".join(terms)
        kept = {letter for letter in sizes if written.count(letter) == 1}
    return prod(size for letter, size in sizes.items() if letter not in kept)


def _fused_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Query times key, and attention weights times value: B * H * Lq * Lk * (D + Dv).

    Arguments begin with query (..., Lq, D), key (..., Lk, D), value (..., Lk, Dv).
    """
    rows = prod(tensor_shape(outputs[0])[:-1])
    query_channels = tensor_shape(inputs[0])[-1]
    key_length, value_channels = tensor_shape(inputs[2])[-2:]
    return rows * key_length * (query_channels + value_channels)


def _projected_attention(batch: int, queries: int, keys: int, channels: int) -> int:
    """Multi-head attention with its four square projections; the number of heads cancels."""
    projections = 2 * batch * (queries + keys) * channels**2
    return projections + 2 * batch * queries * keys * channels


def _native_multi_head_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Inference path of ``nn.MultiheadAttention``: projections and attention in one operator."""
    batch, queries, channels = tensor_shape(inputs[0])
    keys = tensor_shape(inputs[1])[1]
    return _projected_attention(batch, queries, keys, channels)


def _native_transformer_encoder_layer(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Inference path of ``nn.TransformerEncoderLayer``: attention, two norms, two linear layers."""
    batch, length, channels = tensor_shape(inputs[0])
    hidden = tensor_shape(inputs[14])[0]
    tokens = batch * length
    attention = _projected_attention(batch, length, length, channels)
    return attention + 2 * 5 * tokens * channels + 2 * tokens * channels * hidden


def _embedding_bag(inputs: Sequence[Any], outputs: Sequence[Any]) -> int | None:
    """One multiply-add per gathered element when rows are weighted; unweighted bags only add.

    Deformable sampling uses it with four weighted rows (the bilinear corners) per sampling point,
    so it costs 4 per sampled element, exactly as grid sampling does.
    """
    per_sample_weights = inputs[6]
    if not is_given(per_sample_weights):
        return None
    return prod(tensor_shape(inputs[1])) * tensor_shape(inputs[0])[1]


def _grid_sampler(inputs: Sequence[Any], outputs: Sequence[Any]) -> int | None:
    """One multiply-add per neighbour: 4 a sample when bilinear, 8 in three dimensions."""
    interpolation = inputs[2].toIValue()
    if interpolation == _NEAREST:
        return None  # reads one neighbour, multiplies nothing
    shape = tensor_shape(outputs[0])  # (B, C, *spatial)
    neighbours = 16 if interpolation == _BICUBIC else 2 ** (len(shape) - 2)
    return prod(shape) * neighbours


def _deformable_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """The compiled operators, plain and fused; their last argument is (B, Q, H, L, P)."""
    return deformable_attention.multiply_adds(tensor_shape(outputs[0]), tensor_shape(inputs[-1]))


def _hashing(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Projection of points (B, H, N, D) to directions (D, T); finding cells is not counted."""
    return lsh_clustering.hashing_multiply_adds(tensor_shape(inputs[0]), tensor_shape(inputs[1]))


def _sum_of_rows(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Sums of the members of clusters: one addition an element of the points."""
    return lsh_clustering.reducing_additions(tensor_shape(inputs[0]))


def _neighborhood_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Products with the neighbours; the last argument is the table (heads, 2k - 1, 2k - 1)."""
    shapes = (tensor_shape(outputs[0]), tensor_shape(inputs[-1]))
    return neighborhood_attention.multiply_adds(*shapes)


def _index_add(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """One addition an element of the source."""
    return prod(tensor_shape(inputs[3]))


def _not_counted(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """For operators that work, but with comparisons, additions or addresses."""


CONVOLUTIONS = (
    "aten::_convolution",
    "aten::_convolution_mode",
    "aten::convolution",
    "aten::conv1d",
    "aten::conv2d",
    "aten::conv3d",
)
MATRIX_PRODUCTS = (
    "aten::linear",
    "aten::matmul",
    "aten::mm",
    "aten::bmm",
    "aten::mv",
    "aten::dot",
)
MATRIX_PRODUCTS_PLUS = (
    "aten::addmm",
    "aten::addmm_",
    "aten::_addmm_activation",
    "aten::addmv",
    "aten::addmv_",
    "aten::baddbmm",
    "aten::baddbmm_",
)
FUSED_ATTENTIONS = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
)

_QUIET_IN_FVCORE = (
    "__and__ bitwise_not clamp clamp_ eq floor floor_divide gather ge gt index index_put_ "
    "masked_fill max nonzero relu relu_ remainder"
)
"""Operators that fvcore takes for free although they compute something; this count reports them."""

_HANDLERS: dict[str, FlopHandler] = {
    **{f"aten::{name}": _not_counted for name in _QUIET_IN_FVCORE.split()},
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(MATRIX_PRODUCTS, _matrix_product),
    **dict.fromkeys(MATRIX_PRODUCTS_PLUS, _matrix_product_plus),
    **dict.fromkeys(FUSED_ATTENTIONS, _fused_attention),
    "aten::addbmm": _summed_batch_product,
    "aten::einsum": _einsum,
    "aten::_native_multi_head_attention": _native_multi_head_attention,
    "aten::_transformer_encoder_layer_fwd": _native_transformer_encoder_layer,
    "aten::embedding_bag": _embedding_bag,
    "aten::_embedding_bag": _embedding_bag,
    "aten::_embedding_bag_forward_only": _embedding_bag,
    "aten::batch_norm": batchnorm_flop_jit,
    "aten::group_norm": norm_flop_counter(2),
    "aten::layer_norm": norm_flop_counter(2),
    "aten::instance_norm": norm_flop_counter(1),
    "aten::upsample_nearest2d": elementwise_flop_counter(0, 1),
    "aten::upsample_bilinear2d": elementwise_flop_counter(0, 4),
    "aten::upsample_bicubic2d": elementwise_flop_counter(0, 16),
    "aten::adaptive_avg_pool2d": elementwise_flop_counter(1, 0),
    "aten::grid_sampler": _grid_sampler,
    "aten::grid_sampler_2d": _grid_sampler,
    "aten::grid_sampler_3d": _grid_sampler,
    f"efficient_detr::{deformable_attention.PLAIN}": _deformable_attention,
    f"efficient_detr::{deformable_attention.FUSED}": _deformable_attention,
    "aten::index_add": _index_add,
    "aten::index_add_": _index_add,
    "efficient_detr::lsh_hash": _hashing,
    "efficient_detr::cluster_reduce": _sum_of_rows,
    "efficient_detr::lsh_group": _not_counted,  # sorts and compares keys
    "efficient_detr::cluster_broadcast": _not_counted,  # gathers rows
    f"efficient_detr::{neighborhood_attention.NAME}": _neighborhood_attention,
}

_VIEWS = (
    "alias as_strided chunk detach expand expand_as flatten movedim narrow permute reshape "
    "reshape_as select slice split split_with_sizes squeeze squeeze_ swapaxes t transpose unbind "
    "unflatten unsqueeze unsqueeze_ view view_as"
)
_FILLS_AND_COPIES = (
    "arange cat clone constant_pad_nd contiguous copy_ empty empty_like fill_ full full_like "
    "lift_fresh new_empty new_full new_ones new_tensor new_zeros ones ones_like pad repeat roll "
    "stack tensor tile to type_as zero_ zeros zeros_like _to_copy"
)
_BOOKKEEPING = (
    "Bool Float Int IntImplicit FloatImplicit ScalarImplicit dim item len numel size "
    "_shape_as_tensor __getitem__"
)
_NOTHING_AT_INFERENCE = "dropout feature_dropout"

FREE_OPERATORS = frozenset(
    f"aten::{name}"
    for names in (_VIEWS, _FILLS_AND_COPIES, _BOOKKEEPING, _NOTHING_AT_INFERENCE)
    for name in names.split()
)
"""Operators that compute nothing: they view, allocate, fill or copy memory."""


def register_flop_handler(operator: str, handler: FlopHandler) -> None:
    """Tells the FLOP count what a custom operator costs.

    Args:
        operator: name in the traced graph, ``"efficient_detr::deformable_attention"`` for an
            operator made with ``torch.library``, or ``"prim::PythonOp.Name"`` for an autograd
            function of class ``Name``.
        handler: returns the multiply-adds of one call from the call's inputs and outputs; see
            :func:`tensor_shape` and :func:`is_given` for reading them. It must charge what the same
            computation costs when written with plain operators.

    Raises:
        ValueError: the name has no namespace, or the operator already has another handler.
    """
    if "::" not in operator:
        raise ValueError(
            f"'{operator}' is no operator name; write it with its namespace, as in "
            "'efficient_detr::name'."
        )
    if _HANDLERS.get(operator, handler) is not handler:
        raise ValueError(f"The operator '{operator}' already has a FLOP handler.")
    _HANDLERS[operator] = handler


def registered_handlers() -> dict[str, FlopHandler]:
    """A copy of the whole table, operator name -> handler."""
    return dict(_HANDLERS)
