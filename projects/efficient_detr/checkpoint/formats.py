"""All formats of checkpoints that are known, and finding the one of a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from efficient_detr.checkpoint import detrex, hugging_face, official, smca
from efficient_detr.checkpoint.backbone_layouts import BACKBONE_FORMATS
from efficient_detr.checkpoint.conversion import Rename, Row, matches_template
from efficient_detr.checkpoint.layout import CheckpointFormat, Shapes
from efficient_detr.errors import UserError

_EXAMPLES = 3
# Of parallel training, of compiled modules, and of modules that hold a model for a trainer.
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def _names_stay(_: Shapes) -> list[Row]:
    return [Rename("*", "*")]


OWN_FORMAT = CheckpointFormat(
    name="efficient_detr",
    title="names of this project",
    marks=("detector.decoder.*",),
    read_table=_names_stay,
    write_table=_names_stay,
)
"""What training writes; its names are those of the model."""


FORMATS = (OWN_FORMAT, *official.FORMATS, *detrex.FORMATS, *hugging_face.FORMATS, *smca.FORMATS)
"""Formats of whole detectors; the first that fits is that of a file."""


def list_formats() -> list[tuple[str, str]]:
    """Name and title of every format, those of backbones last."""
    backbones = [(one.name, one.title) for one in BACKBONE_FORMATS]
    return [(one.name, one.title) for one in FORMATS] + backbones


def is_backbone_format(name: str) -> bool:
    """Whether a name is that of a format of backbones alone."""
    return any(one.name == name for one in BACKBONE_FORMATS)


def find_format(name: str) -> CheckpointFormat:
    """The format of whole detectors with this name.

    Raises:
        UserError: if there is none.
    """
    for one in FORMATS:
        if one.name == name:
            return one
    names = ", ".join(name for name, _ in list_formats())
    raise UserError(f"There is no checkpoint format '{name}': choose one of {names}.")


def recognize_format(keys: Collection[str]) -> CheckpointFormat | None:
    """The format of a file with these keys, None if it is none of a whole detector."""
    return next((one for one in FORMATS if one.fits(keys)), None)


def without_wrappers(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The keys without the prefixes that modules around a model give to all of them.

    Files of Hugging Face can begin with `model.` throughout, so a known format stays as it is.
    """
    while state and recognize_format(state.keys()) is None:
        found = [one for one in _WRAPPERS if all(key.startswith(one) for key in state)]
        if not found:
            break
        state = {key.removeprefix(found[0]): tensor for key, tensor in state.items()}
    return state


def describe_unknown(keys: Collection[str]) -> str:
    """What to say of keys that fit no format: some of them, and the nearest formats."""
    examples = ", ".join(list(keys)[:_EXAMPLES])
    close = sorted(FORMATS, key=lambda one: _share_of_marks(one, keys), reverse=True)
    titles = [one.title for one in close if _share_of_marks(one, keys) > 0][:2]
    nearest = f"; closest are {' and '.join(titles)}" if titles else ""
    return f"its keys ({examples}, ...) fit no known format{nearest}"


def _share_of_marks(one: CheckpointFormat, keys: Iterable[str]) -> float:
    found = sum(any(matches_template(mark, key) for key in keys) for mark in one.marks)
    return found / len(one.marks)
