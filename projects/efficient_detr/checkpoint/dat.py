"""Tables from the published key layouts of DAT and DAT++ to ours, relative to the backbone.

They cover the classification models of LeapLabTHU/DAT as of 2022 and of 2023, and the backbones of
the detectors that LeapLabTHU/DAT-Detection trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from efficient_detr.checkpoint.conversion import KeyRule
from efficient_detr.modeling.backbones.dat import FEATURES

_COMPUTED = "constants that the model computes"
_STAGE = r"stages\.(\d+)\."
_BLOCK_PART = r"stages\.(\d+)\.{}\.(\d+)\."
_OUR_BLOCK = r"stages.\1.blocks.\2."


def dat_attention() -> list[KeyRule]:
    """One attention of any kind, relative to its module: windows, neighbourhood or deformable."""
    return [
        KeyRule(r"relative_position_index$", None, _COMPUTED),
        KeyRule(r"attn_mask$", None, _COMPUTED),
        KeyRule(r"relative_position_bias_table$", "relative_position_bias_table"),
        KeyRule(r"rpb$", "relative_position_bias_table"),
        KeyRule(r"(?:proj_)?qkv\.", "projection."),
        KeyRule(r"proj(?:_out)?\.", "output."),
        KeyRule(r"proj_q\.", "query."),
        KeyRule(r"proj_k\.", "key."),
        KeyRule(r"proj_v\.", "value."),
        KeyRule(r"conv_offset\.0\.", "keys.offset_network.depthwise."),
        KeyRule(r"conv_offset\.1\.norm\.", "keys.offset_network.norm."),
        KeyRule(r"conv_offset\.3\.", "keys.offset_network.output."),
        KeyRule(r"rpe_table$", "position_bias.relative_position_bias_table"),
        # One entry for all kinds of position: two kinds of table, a convolution of the queries, a
        # network on displacements. The tables differ only by the model that they are for.
        KeyRule(r"rpe_table$", "position_bias.position_bias_table"),
        KeyRule(r"rpe_table\.(?=weight|bias)", "query_convolution."),
        KeyRule(r"rpe_table\.0\.", "position_bias.hidden."),
        KeyRule(r"rpe_table\.2\.", "position_bias.output."),
    ]


def dat_backbone(keys: Iterable[str]) -> list[KeyRule]:
    """The backbone without the norms of its outputs.

    Args:
        keys: those of the file, without a prefix; they say how many convolutions the stem has and
            how many blocks there are.
    """
    keys = list(keys)
    return [
        *_stem(any(key.startswith("patch_proj.3.") for key in keys)),
        *(
            KeyRule(rf"down_projs\.{stage - 1}\.{theirs}", f"stages.{stage}.merging.{ours}")
            for stage in range(1, len(FEATURES))
            for theirs, ours in ((r"0\.", "convolution."), (r"1\.norm\.", "norm."))
        ),
        KeyRule(_STAGE + r"proj\.", r"stages.\1.projection."),
        *(rule for block in range(_depth(keys)) for rule in _branches(block)),
        KeyRule(_BLOCK_PART.format("local_perception_units"), _OUR_BLOCK + "local_perception."),
        *(
            rule.below(_BLOCK_PART.format("attns"), _OUR_BLOCK + "attention.")
            for rule in dat_attention()
        ),
        *(
            KeyRule(_BLOCK_PART.format("mlps") + theirs, _OUR_BLOCK + "feedforward." + ours)
            for theirs, ours in (
                (r"(?:chunk\.)?linear1\.(?:0\.)?", "expand."),
                (r"(?:chunk\.)?linear2\.(?:0\.)?", "contract."),
                (r"dwc\.", "mixing."),
            )
        ),
    ]


def dat_output_norms() -> tuple[KeyRule, ...]:
    """Norms of the backbone's outputs, which only detectors have, one rule for each output."""
    return tuple(
        KeyRule(rf"norms\.{stage}\.norm\.", f"output_norms.{name}.")
        for stage, name in enumerate(FEATURES)
    )


def own_dat_backbone(keys: Iterable[str]) -> list[KeyRule]:
    """The backbone of our own models, without the norms of its outputs.

    Args:
        keys: those of the file; the table is the same for all.
    """
    return [KeyRule(r"stages\.", "stages.")]


def own_dat_output_norms() -> tuple[KeyRule, ...]:
    """Norms of the outputs of our own models, one rule for each output."""
    return tuple(KeyRule(rf"output_norms\.{name}\.", f"output_norms.{name}.") for name in FEATURES)


def _stem(convolutional: bool) -> list[KeyRule]:
    names = {"0": "first.convolution", "1.norm": "first.norm"}
    names |= {"3": "second.convolution", "4.norm": "second.norm"}
    if not convolutional:
        names = {"0": "convolution", "1.norm": "norm"}
    return [
        KeyRule(rf"patch_proj\.{re.escape(theirs)}\.", f"stages.0.merging.{ours}.")
        for theirs, ours in names.items()
    ]


def _depth(keys: Iterable[str]) -> int:
    """Blocks of the deepest stage."""
    found = (re.match(_BLOCK_PART.format("mlps"), key) for key in keys)
    return 1 + max((int(match[2]) for match in found if match), default=-1)


def _branches(block: int) -> list[KeyRule]:
    """Norms and layer scales, two for each block: of the attention, of the feed-forward network."""
    return [
        KeyRule(
            _STAGE + theirs.format(2 * block + offset), rf"stages.\1.blocks.{block}.{branch}{ours}"
        )
        for offset, branch in enumerate(("attention", "feedforward"))
        for theirs, ours in (
            (r"layer_norms\.{}\.norm\.", "_norm."),
            # The code for detection calls the factors of a scale `gamma`.
            (r"layer_scales\.{}\.(?:weight|gamma)$", "_scale.weight"),
        )
    ]
