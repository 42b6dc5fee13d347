"""Tables of keys, which say how a published layout names, packs and repeats our weights.

A table is a list of rows and works in both directions. Keys are written as templates: `{layer}` (or
any other name) stands for a number, a `*` at the end for the rest of the key::

    Rename("transformer.encoder.layers.{layer}.norm1.*", "detector.encoder.layers.{layer}.norm.*")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

_REST = "*"
_REST_GROUP = "_rest"


@dataclass(frozen=True)
class Rename:
    """One weight of theirs is one of ours.

    Attributes:
        theirs: template of their keys.
        ours: template of our keys, with the same numbers.
        pointwise: whether theirs is a 1x1 convolution (C, D, 1, 1) and ours a linear layer (C, D).
    """

    theirs: str
    ours: str
    pointwise: bool = False


@dataclass(frozen=True)
class Packed:
    """Several weights of theirs, one below the other, are one of ours.

    Attributes:
        theirs: templates of their keys, in the order of the rows; the parts are of equal height.
        ours: template of our keys.
    """

    theirs: tuple[str, ...]
    ours: str


@dataclass(frozen=True)
class Copy:
    """A weight that theirs stores once more: read only where its other names are missing.

    Attributes:
        theirs: template of the further keys.
        ours: template of our keys.
    """

    theirs: str
    ours: str


@dataclass(frozen=True)
class Drop:
    """A key of theirs that has no place in our models.

    Attributes:
        theirs: template of their keys.
        reason: for reports.
        values: makes what is written for the key from the shapes of all written weights; None if
            nothing is written. The template then has no number and no rest.
    """

    theirs: str
    reason: str
    values: Callable[[Mapping[str, tuple[int, ...]]], Tensor] | None = None


@dataclass(frozen=True)
class Spread:
    """One weight of theirs is several of ours: read, but not written.

    Attributes:
        theirs: template of their keys.
        ours: templates of our keys, with the same numbers.
    """

    theirs: str
    ours: tuple[str, ...]


Row = Rename | Packed | Copy | Drop | Spread


@dataclass
class ReadState:
    """A foreign state dict under our names.

    Attributes:
        state: our name -> tensor.
        sources: our name -> the keys of theirs that it is made of.
        dropped: foreign key -> why it is not needed.
        unknown: foreign keys that no row knows.
        incomplete: our name -> keys of theirs that are missing among those that are packed into it.
        different: foreign keys that should be copies of others, but differ.
    """

    state: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    incomplete: dict[str, list[str]] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)


def below(rows: Iterable[Row], theirs: str, ours: str) -> list[Row]:
    """The rows of a module inside another.

    Args:
        rows: with names relative to the module; their numbers have other names than those of the
            outer module.
        theirs: template of the outer module in their keys, with the dot at its end.
        ours: the same in our keys.
    """
    return [_below(row, theirs, ours) for row in rows]


def _below(row: Row, theirs: str, ours: str) -> Row:
    if isinstance(row, Packed):
        return Packed(tuple(theirs + one for one in row.theirs), ours + row.ours)
    if isinstance(row, Drop):
        return replace(row, theirs=theirs + row.theirs)
    if isinstance(row, Spread):
        return Spread(theirs + row.theirs, tuple(ours + one for one in row.ours))
    return replace(row, theirs=theirs + row.theirs, ours=ours + row.ours)


# Reading -----------------------------------------------------------------------------------------


def read_keys(
    state: Mapping[str, Any], rows: Sequence[Row], known: Container[str] = ()
) -> ReadState:
    """Find our names for the keys of a foreign checkpoint.

    A copy is read where the weight itself is missing: files without duplicates keep one name of a
    shared weight, whichever.

    Args:
        state: foreign key -> tensor.
        rows: of those that know a key the first decides; but one that gives a `known` name goes
            before all that give none, or drop the key, and a copy goes last. Keys that may be
            copies or not, by the rows, are copies if all of them have the values of one.
        known: names of the model, for layouts in which one key stands for different parts.

    Returns:
        what became of every key.

    Raises:
        KeyError: if two keys get one name.
    """
    found = ReadState()
    parts: dict[str, dict[int, str]] = {}
    copies: dict[str, str] = {}
    heights: dict[str, tuple[str, ...]] = {}
    doubtful: dict[str, str] = {}
    for key in state:
        matches = [match for row in rows for match in _matches(row, key)]
        if not matches:
            found.unknown.append(key)
            continue
        row, name, index, siblings = _best(matches, known)
        if isinstance(row, Rename) and known:
            doubtful.update((key, other) for kind, other, *_ in matches if isinstance(kind, Copy))
        if isinstance(row, Drop):
            found.dropped[key] = row.reason
        elif isinstance(row, Copy):
            copies[key] = name
        elif isinstance(row, Spread):
            found.state |= dict.fromkeys(siblings, state[key])
            found.sources |= dict.fromkeys(siblings, (key,))
        elif isinstance(row, Packed):
            heights[name] = siblings
            parts.setdefault(name, {})[index] = key
        elif name in found.state:
            raise KeyError(f"checkpoint key {key} and another both become {name}")
        else:
            found.state[name] = _squeezed(state[key]) if row.pointwise else state[key]
            found.sources[name] = (key,)
    _join(found, state, parts, heights)
    copies |= _proven_copies(found, state, doubtful)
    _compare(found, state, copies)
    return found


def convert_keys(state: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Rename the keys of a foreign checkpoint.

    Args:
        state: foreign key -> tensor.
        rows: the first that knows a key decides.

    Returns:
        our key -> tensor.

    Raises:
        KeyError: if no row knows a key, two keys get one name, or a part is missing.
    """
    found = read_keys(state, rows)
    if found.unknown:
        raise KeyError(f"no rule for checkpoint key {found.unknown[0]}: is this the right format?")
    for name, keys in found.incomplete.items():
        raise KeyError(f"the checkpoint has no {keys[0]}, a part of {name}")
    return found.state


# Row, our name, part, and the keys of all parts; of a spread one all of our names.
_Match = tuple[Row, str, int, tuple[str, ...]]


def _matches(row: Row, key: str) -> Iterable[_Match]:
    theirs = row.theirs if isinstance(row, Packed) else (row.theirs,)
    for index, template in enumerate(theirs):
        numbers = _match(template, key)
        if numbers is None:
            continue
        if isinstance(row, Spread):
            names = tuple(_fill(one, numbers) for one in row.ours)
            yield row, names[0], index, names
        else:
            ours = "" if isinstance(row, Drop) else _fill(row.ours, numbers)
            siblings = tuple(_fill(one, numbers) for one in theirs)
            yield row, ours, index, siblings


def _best(matches: Sequence[_Match], known: Container[str]) -> _Match:
    usable = [match for match in matches if match[1] in known] or matches[:1]
    return next((match for match in usable if not isinstance(match[0], Copy)), usable[0])


def _join(
    found: ReadState,
    state: Mapping[str, Any],
    parts: Mapping[str, Mapping[int, str]],
    siblings: Mapping[str, tuple[str, ...]],
) -> None:
    """Stack what is packed."""
    for name, keys in parts.items():
        if name in found.state:
            raise KeyError(f"checkpoint key {keys[min(keys)]} and another both become {name}")
        missing = [key for key in siblings[name] if key not in state]
        if missing:
            found.incomplete[name] = missing
            continue
        found.state[name] = torch.cat([state[key] for key in siblings[name]])
        found.sources[name] = siblings[name]


def _proven_copies(
    found: ReadState, state: Mapping[str, Any], doubtful: Mapping[str, str]
) -> dict[str, str]:
    """Keys that rows call copies as well, if all have the values of those; their names are freed.

    A head that all layers share is stored for each of them, as are heads of their own.
    """
    if any(_is_other(state[key], found.state.get(name)) for key, name in doubtful.items()):
        return {}
    for name in [name for name, keys in found.sources.items() if keys[0] in doubtful]:
        del found.state[name], found.sources[name]
    return dict(doubtful)


def _is_other(first: Any, second: Any) -> bool:
    """Whether two tensors are different weights; those without values may be."""
    without_values = isinstance(first, Tensor) and first.device.type == "meta"
    return without_values or not isinstance(second, Tensor) or _differ(first, second)


def _compare(found: ReadState, state: Mapping[str, Any], copies: Mapping[str, str]) -> None:
    """Drop copies, apart from the first one of a weight that is missing."""
    for key, name in copies.items():
        if name not in found.state and name not in found.incomplete:
            found.state[name] = state[key]
            found.sources[name] = (key,)
            continue
        found.dropped[key] = "copies of other weights"
        if _differ(state[key], found.state.get(name)):
            found.different.append(key)


def _differ(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    if first.device.type == "meta" or second.device.type == "meta":
        return first.shape != second.shape
    return not torch.equal(first, second)


def _squeezed(tensor: Any) -> Any:
    """Without the sides of a 1x1 kernel; a larger one stays, and its shape fits nowhere."""
    pointwise = isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
    return tensor[:, :, 0, 0] if pointwise else tensor


# Writing -----------------------------------------------------------------------------------------


def write_keys(state: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """Write our weights under foreign keys, with everything that the foreign model stores twice.

    Args:
        state: our name -> tensor.
        rows: of those that know a name the first decides; copies are written besides.

    Returns:
        foreign key -> tensor; tensors may share memory.

    Raises:
        KeyError: if no row knows a name.
    """
    written: dict[str, Tensor] = {}
    for name, tensor in state.items():
        made = _write(name, tensor, rows)
        if made is None:
            raise KeyError(f"the layout has no place for {name}")
        written.update(made)
    shapes = {key: tuple(tensor.shape) for key, tensor in written.items()}
    for row in rows:
        if isinstance(row, Drop) and row.values is not None:
            written[row.theirs] = row.values(shapes)
    return written


def _write(name: str, tensor: Tensor, rows: Sequence[Row]) -> dict[str, Tensor] | None:
    """Their keys for one of our names, None if there is none."""
    made: dict[str, Tensor] | None = None
    copies: dict[str, Tensor] = {}
    for row in rows:
        if isinstance(row, Drop | Spread):
            continue
        numbers = _match(row.ours, name)
        if numbers is None:
            continue
        if isinstance(row, Copy):
            copies[_fill(row.theirs, numbers)] = tensor
        elif made is None and isinstance(row, Packed):
            keys = [_fill(one, numbers) for one in row.theirs]
            made = dict(zip(keys, tensor.chunk(len(keys)), strict=True))
        elif made is None and isinstance(row, Rename):
            whole = tensor[:, :, None, None] if row.pointwise and tensor.dim() == 2 else tensor
            made = {_fill(row.theirs, numbers): whole}
    return None if made is None else made | copies


# Templates ---------------------------------------------------------------------------------------


def matches_template(template: str, key: str) -> bool:
    """Whether a key is one of those that a template stands for."""
    return _match(template, key) is not None


def _match(template: str, key: str) -> dict[str, str] | None:
    match = _compiled(template).fullmatch(key)
    return None if match is None else match.groupdict()


@cache
def _compiled(template: str) -> re.Pattern[str]:
    ends_open = template.endswith(_REST)
    pieces = re.split(r"\{(\w+)\}", template.removesuffix(_REST))
    seen: set[str] = set()
    pattern = ""
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pattern += re.escape(piece)
        elif piece in seen:
            pattern += f"(?P={piece})"
        else:
            seen.add(piece)
            pattern += rf"(?P<{piece}>\d+)"
    return re.compile(pattern + (f"(?P<{_REST_GROUP}>.+)" if ends_open else ""))


def _fill(template: str, numbers: Mapping[str, str]) -> str:
    filled = re.sub(r"\{(\w+)\}", lambda found: numbers[found[1]], template.removesuffix(_REST))
    return filled + numbers[_REST_GROUP] if template.endswith(_REST) else filled
