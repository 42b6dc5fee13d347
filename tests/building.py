"""Models without storage for their weights, whichever backbone they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from torch.overrides import TorchFunctionMode


class _NumbersHaveStorage(TorchFunctionMode):
    """Keeps `torch.linspace` on the CPU: Detectron2's Swin reads its rates of drop path from it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def without_storage(node: Any) -> Any:
    """What a node of a LazyConfig stands for, on the meta device.

    Skips the test where Detectron2's Swin takes drop path from timm and there is no timm.
    """
    try:
        with torch.device("meta"), _NumbersHaveStorage():
            return instantiate(node)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "timm":
            raise
        pytest.skip("drop path in Detectron2's Swin needs timm")
