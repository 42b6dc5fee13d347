"""What datasets there are and what is known about each."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class _Catalog(UserDict):
    def list(self) -> list[str]:
        """The registered names."""
        return [*self.keys()]

    def remove(self, name: str) -> None:
        """Forget a name; KeyError if it is not registered."""
        self.pop(name)

    def __repr__(self) -> str:
        return f"{type(self).__name__.lstrip('_')}({', '.join(self.keys())})"


class _DatasetCatalog(_Catalog):
    """Functions that return a dataset (a list of dictionaries, one an image), by name."""

    def register(self, name: str, func: Callable[[], Any]) -> None:
        """Add a dataset; AssertionError if the name is taken or ``func`` is not callable."""
        assert callable(func), f"dataset '{name}' needs a function that returns it, got {func!r}"
        assert name not in self, f"dataset '{name}' is already registered"
        self[name] = func

    def get(self, name: str) -> Any:  # type: ignore[override]
        """Call the function of dataset ``name``; KeyError if it is not registered."""
        if name not in self:
            known = ", ".join(self.keys())
            raise KeyError(f"dataset '{name}' is not registered; the registered ones are: {known}")
        return self[name]()


class Metadata(SimpleNamespace):
    """Facts about one dataset as attributes, e.g. ``thing_classes`` (class names).

    An attribute that is set cannot change its value, since several parts rely on it.
    """

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        known = ", ".join(self.__dict__)
        raise AttributeError(f"the metadata of dataset '{self.name}' have no '{key}', only {known}")

    def __setattr__(self, key: str, val: Any) -> None:
        if key in self.__dict__:
            old = self.__dict__[key]
            assert old == val, f"'{key}' of dataset '{self.name}' is {old} and cannot become {val}"
        else:
            super().__setattr__(key, val)

    def as_dict(self) -> dict[str, Any]:
        """A copy of all facts."""
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> Metadata:
        """Set several attributes; returns itself."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """An attribute, or ``default`` where it is not set."""
        return getattr(self, key, default)


class _MetadataCatalog(_Catalog):
    """Metadata by dataset name."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        """The metadata of a dataset; empty ones are made where there are none yet."""
        assert len(name) > 0, "a dataset name is empty"
        if name not in self:
            self[name] = Metadata(name=name)
        return self[name]


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
