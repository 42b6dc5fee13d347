"""Rename the keys of a state dict by a declarative table."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class KeyRule:
    """One row of a table: where the start of a key matches `pattern`, it becomes `replacement`.

    Attributes:
        pattern: regular expression, anchored at the start of the key.
        replacement: as for `re.sub`, or None to drop the key.
        reason: why the key is dropped, for reports.
    """

    pattern: str
    replacement: str | None
    reason: str = "copies of other weights"

    def rename(self, key: str) -> str | None:
        """Our name of a key that the pattern matches, None to drop it."""
        if self.replacement is None:
            return None
        return re.sub("^" + self.pattern, self.replacement, key)

    def below(self, pattern: str, replacement: str) -> KeyRule:
        """The rule for a module inside another.

        Args:
            pattern: of the outer module; if it has groups, this rule must not refer to its own.
            replacement: our name of the outer module.
        """
        inner = None if self.replacement is None else replacement + self.replacement
        return KeyRule(pattern + self.pattern, inner, self.reason)


@dataclass
class RenamedState:
    """A foreign state dict under our names.

    Attributes:
        names: our name -> foreign key.
        dropped: foreign key -> why it has no place in our model.
    """

    names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def rename_keys(
    state: Mapping[str, Tensor], rules: Sequence[KeyRule], known: Container[str] = ()
) -> RenamedState:
    """Find our names for the keys of a foreign checkpoint.

    Args:
        state: foreign key -> tensor.
        rules: of those whose pattern matches a key the first decides, or the first that gives a
            `known` name.
        known: names of the model, for layouts in which one key stands for different parts.

    Raises:
        KeyError: if no rule matches a key, or two keys get one name.
    """
    renamed = RenamedState()
    patterns = [re.compile(rule.pattern) for rule in rules]
    for key in state:
        pairs = zip(rules, patterns, strict=True)
        matching = [rule for rule, pattern in pairs if pattern.match(key)]
        if not matching:
            raise KeyError(f"no rule for checkpoint key {key}: is this the right format?")
        names = [rule.rename(key) for rule in matching]
        if names[0] is None:
            renamed.dropped[key] = matching[0].reason
            continue
        name = next((name for name in names if name is not None and name in known), names[0])
        if name in renamed.names:
            raise KeyError(f"checkpoint key {key} and another both become {name}")
        renamed.names[name] = key
    return renamed


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
    return {name: state[key] for name, key in rename_keys(state, rules).names.items()}
