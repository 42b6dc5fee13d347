"""What files of measurements must hold, said once and checked before anything is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """Values that a key may have.

    Attributes:
        words: what they are; ends the sentence "... must be".
        fits: whether a value is one.
    """

    words: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class OrNull:
    """What a schema describes, or null."""

    schema: Any


Schema = Kind | OrNull | dict[str, Any]
"""A kind of value, or the schemas of an object's keys.

A key that ends in "?" may be absent; "*" is for all keys that are not named.
"""


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _is_whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


FINITE = Kind("a finite number", _is_finite)
NUMBER = Kind("a number that is not negative", _is_number)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
WHOLE = Kind("a whole number above 0", _is_whole)
IMAGE_SIZE = Kind("the size of images, [height, width] as of --image-size", _is_size)
TEXT = Kind("a text", lambda value: isinstance(value, str))
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
FACT = Kind("a text or a number", lambda value: TEXT.fits(value) or NUMBER.fits(value))
FACTS = {"*": FACT}
TEXTS = Kind(
    "a list of texts", lambda value: isinstance(value, list) and all(map(TEXT.fits, value))
)
EMPTY = Kind("empty: models are measured with random weights", lambda value: not value)


def complaint(value: Any, schema: Schema, key: str = "") -> str | None:
    """What is wrong with a value.

    Args:
        value: as JSON gave it.
        schema: what it must be.
        key: where it stands, with dots.

    Returns:
        The first fault as a clause that names the key, or None.
    """
    if isinstance(schema, OrNull):
        return None if value is None else complaint(value, schema.schema, key)
    if isinstance(schema, Kind):
        return None if schema.fits(value) else f'"{key}" must be {schema.words}, not {value!r}'
    if not isinstance(value, dict):
        return f'"{key}" must be an object, not {value!r}'
    named = {name.removesuffix("?") for name in schema}
    for name, inner in schema.items():
        plain = name.removesuffix("?")
        if plain == name != "*" and name not in value:
            return f'"{_below(key, name)}" is missing'
        for one in set(value) - named if name == "*" else {plain} & set(value):
            fault = complaint(value[one], inner, _below(key, one))
            if fault:
                return fault
    return None


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
