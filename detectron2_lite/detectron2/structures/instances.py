"""The objects of one image, as columns of equal length."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

import torch


class Instances:
    """Fields of equal length (boxes, scores, classes, ...) of the objects of one image.

    A field is read, written and created as an attribute; names that begin with an underscore are
    ordinary attributes. ``image_size`` is (height, width).
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any) -> None:
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
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
        return name in self._fields

    def remove(self, name: str) -> None:
        del self._fields[name]

    def get(self, name: str) -> Any:
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
            start = range(len(self))[item]
            item = slice(start, start + 1)
        return Instances(self._image_size, **{k: v[item] for k, v in self._fields.items()})

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances without fields have no length")

    def __iter__(self) -> NoReturn:
        raise NotImplementedError("Instances cannot be iterated over; use indices or fields")

    @staticmethod
    def cat(instance_lists: Sequence[Instances]) -> Instances:
        """Join Instances of one image; fields may be tensors, lists or classes with ``cat``."""
        first = instance_lists[0]
        sizes = [entry.image_size for entry in instance_lists]
        assert all(size == first.image_size for size in sizes), f"image sizes differ: {sizes}"
        joined = Instances(first.image_size)
        for name, value in first.get_fields().items():
            parts = [entry.get(name) for entry in instance_lists]
            if isinstance(value, torch.Tensor):
                joined.set(name, torch.cat(parts))
            elif isinstance(value, list):
                joined.set(name, list(chain.from_iterable(parts)))
            else:
                joined.set(name, type(value).cat(parts))
        return joined

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        return (
            f"{type(self).__name__}(num_instances={len(self)}, image_height={self._image_size[0]}, "
            f"image_width={self._image_size[1]}, fields=[{fields}])"
        )
