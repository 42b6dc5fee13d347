"""Lets closures and local classes, which pickle refuses, travel to data-loader workers."""

from typing import Any

import cloudpickle


class PicklableWrapper:
    """Behaves as the wrapped object when called, and pickles it by value."""

    def __init__(self, obj: Any) -> None:
        self._obj: Any = obj._obj if isinstance(obj, PicklableWrapper) else obj

    def __reduce__(self) -> tuple[Any, ...]:
        return cloudpickle.loads, (cloudpickle.dumps(self._obj),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._obj(*args, **kwargs)
