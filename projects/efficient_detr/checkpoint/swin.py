"""Tables for the published key layout of Swin and that of Detectron2's backbone.

Detectron2 keeps the official names inside the backbone; the rest of a classification model has no
place in it.
"""

from __future__ import annotations

from efficient_detr.checkpoint.conversion import Drop, Rename, Row
from efficient_detr.checkpoint.layout import Shapes
from efficient_detr.checkpoint.shapes import count_parts
from efficient_detr.checkpoint.windows import (
    COMPUTED,
    relative_position_index,
    shifted_window_mask,
    window_side,
    written_constant,
)

SWIN_HEAD = Rename("head.*", "head.*")
"""The classification head, ours relative to the classifier."""

SWIN_HEAD_NORM = Rename("norm.*", "norm3.*")
"""The norm before the head."""

SWIN_OUTPUT_NORMS = tuple(Rename(f"norm{stage}.*", f"norm{stage}.*") for stage in range(4))
"""Norms of the backbone's outputs, which only detectors have."""

_SAME_NAMES = tuple(
    Rename(name, name) for name in ("patch_embed.*", "layers.*", "absolute_pos_embed")
)
_WINDOWS_OF_IMAGE = 32
_CELLS_OF_PATCH = 4


def swin_backbone(shapes: Shapes) -> list[Row]:
    """The table for a file, without the norms of its outputs, relative to the backbone.

    Args:
        shapes: of the file; the table is the same for all.
    """
    block = "layers.{stage}.blocks.{block}."
    return [
        Drop(f"{block}attn_mask", COMPUTED),
        Drop(f"{block}attn.relative_position_index", COMPUTED),
        *_SAME_NAMES,
    ]


def swin_from_ours(shapes: Shapes) -> list[Row]:
    """The table for a backbone of ours, with the constants that the published code stores.

    Published models saw images of 32 windows a side; the masks are those of such images.

    Args:
        shapes: of ours, names relative to the backbone.
    """
    rows: list[Row] = [*_SAME_NAMES, *SWIN_OUTPUT_NORMS]
    num_stages = count_parts(shapes, "layers.")
    for stage in range(num_stages):
        for number in range(count_parts(shapes, f"layers.{stage}.blocks.")):
            block = f"layers.{stage}.blocks.{number}."
            window = window_side(shapes[f"{block}attn.relative_position_bias_table"][0])
            index = relative_position_index(window)
            rows.append(written_constant(f"{block}attn.relative_position_index", index))
            side = _WINDOWS_OF_IMAGE // _CELLS_OF_PATCH * window // 2**stage
            # Every second block is shifted, where there is more than one window.
            if number % 2 and side > window and side % window == 0:
                mask = shifted_window_mask(side, window, window // 2)
                rows.append(written_constant(f"{block}attn_mask", mask))
    return rows
