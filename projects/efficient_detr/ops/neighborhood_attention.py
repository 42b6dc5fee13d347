"""Neighbourhood attention: every cell of a map attends to the k * k cells around it."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_detr.ops import neighborhood_attention_pytorch as in_pytorch
from efficient_detr.ops.contexts import needs_pytorch
from efficient_detr.ops.neighborhood_attention_library import DEVICES, OPERATORS
from efficient_detr.ops.neighborhood_attention_natten import attend_with_natten, uses_natten


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, position_bias_table: Tensor
) -> Tensor:
    """Attend from every cell of a map to its neighbourhood (arXiv 2204.07143, equations 2 to 4).

    The neighbourhood of a cell less than k // 2 cells from a border is moved inward, so that all
    have k * k cells. The logits of a pair are D^-0.5 times the product of query and key, plus the
    entry of the table at row (key's row - query's row + k - 1) and likewise the column.

    The library `natten` is used in eager mode where one is installed that can add such a table, see
    `ops.neighborhood_attention_natten`, and PyTorch's operators elsewhere. Derivatives exist once,
    not twice.

    Args:
        query: (B, H, W, heads, D), float64, float32, float16 or bfloat16.
        key: of the same shape and dtype.
        value: of the same shape and dtype.
        position_bias_table: (heads, 2k - 1, 2k - 1) with an odd k, at most H and W.

    Returns:
        (B, H, W, heads, D) in the dtype of the maps.

    Raises:
        ValueError: if shapes do not fit each other or the neighbourhood does not fit into the map.
    """
    if not torch.jit.is_tracing():  # there, sizes are tensors
        _check(query, key, value, position_bias_table)
    arguments = (query, key, value, position_bias_table)
    if needs_pytorch() or query.device.type not in DEVICES:
        return in_pytorch.attend(*arguments)
    eager = not (torch.jit.is_tracing() or torch.compiler.is_compiling())
    several = position_bias_table.shape[-1] > 1  # natten refuses neighbourhoods of one cell
    if eager and several and uses_natten(query.device, query.dtype):
        return attend_with_natten(*arguments)
    output: Tensor = OPERATORS.neighborhood_attention(*arguments)
    return output


def _check(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> None:
    if query.dim() != 5 or not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(features.shape)) for features in (query, key, value))
        raise ValueError(
            f"query, key and value must all be (B, H, W, heads, D) alike, but are {shapes}."
        )
    side = table.shape[-1]
    if table.shape != (query.shape[3], side, side) or side % 4 != 1:
        raise ValueError(
            f"position_bias_table must be (heads, 2k - 1, 2k - 1) with {query.shape[3]} heads and "
            f"an odd k, but is {tuple(table.shape)}."
        )
    if (side + 1) // 2 > min(query.shape[1:3]):
        raise ValueError(
            f"a neighbourhood of {(side + 1) // 2} cells does not fit into a map of "
            f"{query.shape[1]} x {query.shape[2]}; pad the map."
        )
