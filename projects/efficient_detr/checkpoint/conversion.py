"""Rename the keys of a state dict by a declarative table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KeyRule:
    """One row of a table: where the start of a key matches `pattern`, it becomes `replacement`.

    Attributes:
        pattern: regular expression, anchored at the start of the key.
        replacement: as for `re.sub`, or None to drop the key (a duplicate of another).
    """

    pattern: str
    replacement: str | None


def convert_keys(state: Mapping[str, Tensor], rules: Sequence[KeyRule]) -> dict[str, Tensor]:
    """Rename the keys of a foreign checkpoint.

    Args:
        state: foreign key -> tensor.
        rules: the first rule whose pattern matches a key decides.

    Returns:
        our key -> tensor, the tensors themselves unchanged.

    Raises:
        KeyError: if no rule matches a key, or two keys get one name.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        rule = next((rule for rule in rules if re.match(rule.pattern, key)), None)
        if rule is None:
            raise KeyError(f"no rule for checkpoint key {key}: is this the right format?")
        if rule.replacement is None:
            continue
        name = re.sub("^" + rule.pattern, rule.replacement, key)
        if name in converted:
            raise KeyError(f"checkpoint key {key} and another both become {name}")
        converted[name] = tensor
    return converted
