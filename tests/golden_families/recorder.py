"""Look inside a model while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Recorder:
    """Keeps what went into and came out of every module of a model, call by call."""

    def __init__(self, model: nn.Module) -> None:
        self._calls: dict[Any, list[tuple[dict[str, Any], Any]]] = {}
        for module in model.modules():
            module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        self._calls.setdefault(module, []).append((arguments, output))

    def spy(self, owner: Any, method: str) -> None:
        """Record a method that is not `forward`; `(owner, method)` then names it."""
        original: Callable[..., Any] = getattr(owner, method)

        def spying(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            arguments = inspect.signature(original).bind(*args, **kwargs).arguments
            self._calls.setdefault((owner, method), []).append((arguments, result))
            return result

        setattr(owner, method, spying)

    def outputs(self, called: Any) -> list[Any]:
        """What a module, or a method that is spied on, returned each time."""
        return [output for _, output in self._calls[called]]

    def output(self, called: Any) -> Any:
        """What a module, or a method that is spied on, returned the only time."""
        (output,) = self.outputs(called)
        return output

    def inputs(self, called: Any) -> list[dict[str, Any]]:
        """What a module, or a method that is spied on, was called with each time, by name."""
        return [arguments for arguments, _ in self._calls[called]]

    def arguments(self, called: Any) -> dict[str, Any]:
        """What a module, or a method that is spied on, was called with the only time, by name."""
        (arguments,) = self.inputs(called)
        return arguments
