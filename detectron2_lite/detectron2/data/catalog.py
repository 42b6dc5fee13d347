"""What datasets there are and what is known about each."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class _Catalog(UserDict):
    def list(self) -> list[str]:
        return [*self.keys()]

    def remove(self, name: str) -> None:
        self.pop(name)


class _DatasetCatalog(_Catalog):
    """Functions that return a dataset (a list of dictionaries, one an image), by name."""

    def register(self, name: str, func: Callable[[], Any]) -> None:
        assert callable(func), f"dataset '{name}' needs a function that returns it, got {func!r}"
        assert name not in self, f"dataset '{name}' is already registered"
        self[name] = func

    def get(self, name: str) -> Any:  # type: ignore[override]
        if name not in self:
            known = ", ".join(self.keys())
            raise KeyError(f"dataset '{name}' is not registered; the registered ones are: {known}")
        return self[name]()


class Metadata(SimpleNamespace):
    """Facts about one dataset, e.g. ``thing_classes``; one that is set cannot change."""

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        known = ", ".join(self.__dict__)
        raise AttributeError(f"the metadata of dataset '{self.name}' have no '{key}', only {known}")

    def __setattr__(self, key: str, val: Any) -> None:
        old = self.__dict__.setdefault(key, val)
        assert old == val, f"'{key}' of dataset '{self.name}' is {old} and cannot become {val}"

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> Metadata:
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


class _MetadataCatalog(_Catalog):
    """Metadata by dataset name, made when first asked for."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        assert len(name) > 0, "a dataset name is empty"
        return self.setdefault(name, Metadata(name=name))


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
