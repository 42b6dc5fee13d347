"""Tables for the published key layouts of DAT and DAT++ and ours, relative to the backbone.

They cover the classification models of LeapLabTHU/DAT as of 2022 and of 2023, and the backbones of
the detectors that LeapLabTHU/DAT-Detection trained.
"""

from __future__ import annotations

from collections.abc import Iterable

from efficient_detr.checkpoint.conversion import Drop, Rename, Row, below
from efficient_detr.checkpoint.layout import Shapes
from efficient_detr.checkpoint.shapes import count_parts, inside
from efficient_detr.checkpoint.windows import (
    COMPUTED,
    relative_position_index,
    shifted_window_mask,
    window_side,
    written_constant,
)
from efficient_detr.modeling.backbones.dat import FEATURES

DAT_HEAD = Rename("cls_head.*", "head.*")
"""The classification head, ours relative to the classifier."""

DAT_HEAD_NORM = Rename("cls_norm.norm.*", f"output_norms.{FEATURES[-1]}.*")
"""The norm before the head."""

DAT_OUTPUT_NORMS = tuple(
    Rename(f"norms.{stage}.norm.*", f"output_norms.{name}.*") for stage, name in enumerate(FEATURES)
)
"""Norms of the backbone's outputs, which only detectors have."""

OWN_OUTPUT_NORMS = tuple(Rename(row.ours, row.ours) for row in DAT_OUTPUT_NORMS)
"""The same in our own files."""

WINDOW_ATTENTION = (
    Rename("relative_position_bias_table", "relative_position_bias_table"),
    Rename("proj_qkv.*", "projection.*"),
    Rename("proj_out.*", "output.*"),
)
"""Attention in windows, shifted or not, relative to its module."""

NEIGHBORHOOD_ATTENTION = (
    Rename("rpb", "relative_position_bias_table"),
    Rename("qkv.*", "projection.*"),
    Rename("proj.*", "output.*"),
)
"""Neighbourhood attention, relative to its module."""

DEFORMABLE_ATTENTION = (
    Rename("proj_q.*", "query.*", pointwise=True),
    Rename("proj_k.*", "key.*", pointwise=True),
    Rename("proj_v.*", "value.*", pointwise=True),
    Rename("proj_out.*", "output.*", pointwise=True),
    Rename("conv_offset.0.*", "keys.offset_network.depthwise.*"),
    Rename("conv_offset.1.norm.*", "keys.offset_network.norm.*"),
    Rename("conv_offset.3.*", "keys.offset_network.output.*", pointwise=True),
    # One key for all kinds of position: two kinds of table, a convolution of the queries, a network
    # on displacements. The tables differ only by the model that they are for.
    Rename("rpe_table", "position_bias.relative_position_bias_table"),
    Rename("rpe_table", "position_bias.position_bias_table"),
    Rename("rpe_table.weight", "query_convolution.weight"),
    Rename("rpe_table.bias", "query_convolution.bias"),
    Rename("rpe_table.0.*", "position_bias.hidden.*"),
    Rename("rpe_table.2.*", "position_bias.output.*"),
)
"""Deformable attention, relative to its module."""

_PLAIN_STEM = (
    Rename("patch_proj.0.*", "stages.0.merging.convolution.*"),
    Rename("patch_proj.1.norm.*", "stages.0.merging.norm.*"),
)
_CONVOLUTIONAL_STEM = (
    Rename("patch_proj.0.*", "stages.0.merging.first.convolution.*"),
    Rename("patch_proj.1.norm.*", "stages.0.merging.first.norm.*"),
    Rename("patch_proj.3.*", "stages.0.merging.second.convolution.*"),
    Rename("patch_proj.4.norm.*", "stages.0.merging.second.norm.*"),
)

_CLASSIFICATION_SCALE, _DETECTION_SCALE = "weight", "gamma"
"""What the two codes call the factors of a layer scale."""

_TABLE = "relative_position_bias_table"
_WINDOW_TABLE = "stages.{}.blocks.{}.attention." + _TABLE
_DEFORMABLE_TABLE = "stages.{}.blocks.{}.attention.position_bias." + _TABLE


def dat_backbone(shapes: Shapes) -> list[Row]:
    """The table for a file, without the norms of its outputs.

    Args:
        shapes: of the file, names relative to the backbone.
    """
    stages = range(len(FEATURES))
    depth = max(count_parts(shapes, f"stages.{stage}.mlps.") for stage in stages)
    return [
        Drop("stages.{stage}.attns.{block}.relative_position_index", COMPUTED),
        Drop("stages.{stage}.attns.{block}.attn_mask", COMPUTED),
        *(_CONVOLUTIONAL_STEM if "patch_proj.3.weight" in shapes else _PLAIN_STEM),
        *_between_blocks(),
        # The kinds have no name in common that stands for different weights.
        *_block(
            "{stage}",
            "{block}",
            (*DEFORMABLE_ATTENTION, *WINDOW_ATTENTION, *NEIGHBORHOOD_ATTENTION),
            (*_feedforward(2023), *_feedforward(2022), *_feedforward(None)),
        ),
        *(row for block in range(depth) for row in _branches("{stage}", block)),
    ]


def dat_from_ours(shapes: Shapes) -> list[Row]:
    """The table for a backbone of ours, with the constants that the published code stores.

    What the weights do not say is as in the published models: the second of two window attentions
    in a row is shifted, and maps are square.

    Args:
        shapes: of ours, names relative to the backbone, with `head.weight` if it has a head.
    """
    convolutional_stem = "stages.0.merging.first.convolution.weight" in shapes
    year = 2023 if convolutional_stem or _has_parts_of_2023(shapes) else 2022
    scale = _CLASSIFICATION_SCALE if "head.weight" in shapes else _DETECTION_SCALE
    rows: list[Row] = [
        *(_CONVOLUTIONAL_STEM if convolutional_stem else _PLAIN_STEM),
        *_between_blocks(),
        *DAT_OUTPUT_NORMS,
    ]
    for stage, block in _blocks(shapes):
        ours = inside(shapes, f"stages.{stage}.blocks.{block}.")
        feedforward = _feedforward(year if "feedforward.mixing.weight" in ours else None)
        attention = _attention(inside(ours, "attention."))
        rows += _block(str(stage), str(block), attention, feedforward)
        rows += _branches(str(stage), block, scale)
    return rows + _constants(shapes)


def own_dat_backbone(shapes: Shapes) -> list[Row]:
    """The table for our own files, without the norms of their outputs.

    Args:
        shapes: of the file; the table is the same for all.
    """
    return [Rename("stages.*", "stages.*")]


def _between_blocks() -> list[Row]:
    """What is outside of the blocks and behind the stem, equal in all models."""
    rows: list[Row] = [Rename("stages.{stage}.proj.*", "stages.{stage}.projection.*", True)]
    for stage in range(1, len(FEATURES)):
        down, merging = f"down_projs.{stage - 1}", f"stages.{stage}.merging"
        rows.append(Rename(f"{down}.0.*", f"{merging}.convolution.*"))
        rows.append(Rename(f"{down}.1.norm.*", f"{merging}.norm.*"))
    return rows


def _block(
    stage: str, block: str, attention: Iterable[Row], feedforward: Iterable[Row]
) -> list[Row]:
    """What a block has once.

    Args:
        stage: its number, or what stands for it.
        block: its number in the stage, likewise.
        attention: relative to the attention.
        feedforward: relative to the feed-forward network.
    """
    theirs, ours = f"stages.{stage}.", f"stages.{stage}.blocks.{block}."
    return [
        Rename(f"{theirs}local_perception_units.{block}.*", f"{ours}local_perception.*"),
        *below(attention, f"{theirs}attns.{block}.", f"{ours}attention."),
        *below(feedforward, f"{theirs}mlps.{block}.", f"{ours}feedforward."),
    ]


def _branches(stage: str, block: int, scale: str = _CLASSIFICATION_SCALE) -> list[Row]:
    """What a block has for each of its branches: theirs are two in a row.

    Args:
        stage: its number, or what stands for it.
        block: its number in the stage.
        scale: name that is written for the factors of layer scales; both are read.
    """
    rows: list[Row] = []
    other = _DETECTION_SCALE if scale == _CLASSIFICATION_SCALE else _CLASSIFICATION_SCALE
    for number, branch in enumerate(("attention", "feedforward"), start=2 * block):
        theirs, ours = f"stages.{stage}.", f"stages.{stage}.blocks.{block}.{branch}"
        rows.append(Rename(f"{theirs}layer_norms.{number}.norm.*", f"{ours}_norm.*"))
        rows.append(Rename(f"{theirs}layer_scales.{number}.{scale}", f"{ours}_scale.weight"))
        rows.append(Rename(f"{theirs}layer_scales.{number}.{other}", f"{ours}_scale.weight"))
    return rows


def _feedforward(year: int | None) -> tuple[Row, ...]:
    """Relative to the network; the year is that of the code of one with a convolution inside."""
    if year is None:
        return (
            Rename("chunk.linear1.*", "expand.*"),
            Rename("chunk.linear2.*", "contract.*"),
        )
    number = ".0" if year == 2023 else ""
    return (
        Rename(f"linear1{number}.*", "expand.*", pointwise=True),
        Rename(f"linear2{number}.*", "contract.*", pointwise=True),
        Rename("dwc.*", "mixing.*"),
    )


def _attention(shapes: Shapes) -> tuple[Row, ...]:
    """The rows of an attention, by its weights under our names."""
    if "query.weight" in shapes:
        return DEFORMABLE_ATTENTION
    return NEIGHBORHOOD_ATTENTION if len(shapes.get(_TABLE, ())) == 3 else WINDOW_ATTENTION


def _blocks(shapes: Shapes) -> Iterable[tuple[int, int]]:
    """Numbers of stage and block, of all blocks of ours."""
    for stage in range(len(FEATURES)):
        for block in range(count_parts(shapes, f"stages.{stage}.blocks.")):
            yield stage, block


def _has_parts_of_2023(shapes: Shapes) -> bool:
    """Whether there is a module that the code of 2022 has not."""
    return any(
        ".local_perception." in key
        or ".position_bias.hidden." in key
        or (key.endswith(".attention.relative_position_bias_table") and len(shape) == 3)
        for key, shape in shapes.items()
    )


def _constants(shapes: Shapes) -> list[Row]:
    """Indices of all windows and masks of shifted windows."""
    rows: list[Row] = []
    sides = _map_sides(shapes)
    in_a_row = 0
    for stage, block in _blocks(shapes):
        table = shapes.get(_WINDOW_TABLE.format(stage, block), ())
        if len(table) != 2:
            in_a_row = 0
            continue
        in_a_row = 1 if block == 0 else in_a_row + 1
        theirs, window = f"stages.{stage}.attns.{block}.", window_side(table[0])
        index = relative_position_index(window)
        rows.append(written_constant(f"{theirs}relative_position_index", index))
        # Of window attentions in a row every second one is shifted.
        if in_a_row % 2 == 0 and sides is not None and sides[stage] % window == 0:
            mask = shifted_window_mask(sides[stage], window, (window + 1) // 2)
            rows.append(written_constant(f"{theirs}attn_mask", mask))
    return rows


def _map_sides(shapes: Shapes) -> list[int] | None:
    """Cells of each stage's map in training, by a table of positions; None if there is none."""
    for stage, block in _blocks(shapes):
        table = shapes.get(_DEFORMABLE_TABLE.format(stage, block))
        if table is not None:
            first = (table[-1] + 1) // 2 * 2**stage
            return [first // 2**number for number in range(len(FEATURES))]
    return None
