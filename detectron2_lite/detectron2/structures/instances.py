"""The objects of one image, as columns of equal length."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

import torch


class Instances:
    """Named fields (boxes, scores, classes, ...) that describe the same objects of one image.

    A field is read, written and created as an attribute; names that begin with an underscore are
    ordinary attributes.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any) -> None:
        """Start from ``image_size`` (height, width) and fields given by name."""
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self._image_size

    def __setattr__(self, name: str, val: Any) -> None:
        if name[:1] == "_":
            object.__setattr__(self, name, val)
        else:
            self.set(name, val)

    def __getattr__(self, name: str) -> Any:
        # "_fields" itself is looked up here only while copy or pickle rebuilds an object.
        if name != "_fields" and name in self._fields:
            return self._fields[name]
        raise AttributeError(f"these Instances have no field '{name}'")

    def set(self, name: str, value: Any) -> None:
        """Create or replace a field; AssertionError if its length is not that of the others."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # len() of a tensor warns while a model is traced
            length = len(value)
            if self._fields:
                expected = len(self)
                assert length == expected, f"field '{name}' has {length} entries, not {expected}"
        self._fields[name] = value

    def has(self, name: str) -> bool:
        """Whether the field exists."""
        return name in self._fields

    def remove(self, name: str) -> None:
        """Delete a field; KeyError if there is none of that name."""
        del self._fields[name]

    def get(self, name: str) -> Any:
        """The field; KeyError if there is none of that name."""
        return self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """The fields by name (the dictionary itself, not a copy)."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> Instances:
        """New Instances whose fields went through their own ``to``, where they have one."""
        moved = Instances(self._image_size)
        for name, value in self._fields.items():
            moved.set(name, value.to(*args, **kwargs) if hasattr(value, "to") else value)
        return moved

    def __getitem__(self, item: Any) -> Instances:
        """Objects by number (IndexError outside the range), slice, mask or indices."""
        if type(item) is int:
            if not -len(self) <= item < len(self):
                raise IndexError(f"object {item} of {len(self)} does not exist")
            item = slice(item, None, len(self))
        chosen = Instances(self._image_size)
        for name, value in self._fields.items():
            chosen.set(name, value[item])
        return chosen

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances without fields have no length")

    def __iter__(self) -> NoReturn:
        raise NotImplementedError("Instances cannot be iterated over; use indices or fields")

    @staticmethod
    def cat(instance_lists: Sequence[Instances]) -> Instances:
        """Join Instances of one image; fields may be tensors, lists or classes with ``cat``.

        Raises:
            AssertionError: the list is empty or the image sizes differ.
            ValueError: a field of another type.
        """
        assert len(instance_lists) > 0, "there is nothing to join"
        assert all(isinstance(entry, Instances) for entry in instance_lists)
        if len(instance_lists) == 1:
            return instance_lists[0]
        image_size = instance_lists[0].image_size
        if not isinstance(image_size, torch.Tensor):
            assert all(entry.image_size == image_size for entry in instance_lists)
        joined = Instances(image_size)
        for name in instance_lists[0].get_fields():
            joined.set(name, _join_field(name, [entry.get(name) for entry in instance_lists]))
        return joined

    def __str__(self) -> str:
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        return (
            f"{type(self).__name__}(num_instances={len(self)}, image_height={self._image_size[0]}, "
            f"image_width={self._image_size[1]}, fields=[{fields}])"
        )

    __repr__ = __str__


def _join_field(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(values)
    if isinstance(first, list):
        return list(chain.from_iterable(values))
    if hasattr(type(first), "cat"):
        return type(first).cat(values)
    raise ValueError(f"field '{name}' of type {type(first)} cannot be joined")
