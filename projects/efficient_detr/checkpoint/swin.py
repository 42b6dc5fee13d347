"""Table from the published key layout of Swin to that of Detectron2's backbone.

Detectron2 keeps the official names inside the backbone; the rest of a classification model has no
place in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from efficient_detr.checkpoint.conversion import KeyRule


def swin_backbone(keys: Iterable[str]) -> list[KeyRule]:
    """The backbone without the norms of its outputs.

    Args:
        keys: those of the file; the table is the same for all.
    """
    block = r"layers\.\d+\.blocks\.\d+\."
    constants = (r"attn_mask$", r"attn\.relative_position_index$")
    return [
        *(KeyRule(block + name, None, "constants that the model computes") for name in constants),
        KeyRule(r"(patch_embed\.|layers\.|absolute_pos_embed$)", r"\1"),
    ]


def swin_output_norms() -> tuple[KeyRule, ...]:
    """Norms of the backbone's outputs, which only detectors have, one rule for each output."""
    return tuple(KeyRule(rf"norm{stage}\.", f"norm{stage}.") for stage in range(4))
