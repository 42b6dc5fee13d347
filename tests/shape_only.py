"""Models run for their shapes: what costs time is skipped, so that a full-size trace takes seconds.

Nothing here is needed for a right count, which depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

_LARGE = 50_000
"""Elements from which a float tensor has no values; masks, image sizes and scores keep theirs."""

_OF_MASKS = {"aten::upsample_nearest2d", "aten::_to_copy"}
"""How masks of padding are scaled down, which are float and large on the way."""


class ShapesOnly(TorchDispatchMode):
    """Within the `with` block, operators on large float tensors return zeros without storage.

    Masks and other tensors that decide how many tokens there are stay right. What depends on
    features does not: top-k takes some tokens, and hashing finds one cluster.

    Works while a model is traced: the tracer sees every operator before this mode does.
    """

    def __enter__(self) -> ShapesOnly:
        # While tracing, sizes are tensors, but not in another thread.
        self._thread = ThreadPoolExecutor(1)
        self._convolutions = _TracedConvolutions()
        self._convolutions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._convolutions.__exit__(*error)
        self._thread.shutdown()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        runs = _makes_view(func) or func._schema.name in _OF_MASKS
        if runs or not tree_any(_is_large, (args, kwargs)):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0]
        return self._thread.submit(_zeros_like_result, func, args, kwargs).result()


class _TracedConvolutions(TorchFunctionMode):
    """Calls the form of a convolution that ends up in a trace, one level below the usual one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not torch.nn.functional.conv2d:
            return func(*args, **(kwargs or {}))
        return _convolution(*args, **(kwargs or {}))


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    stride, padding, dilation = (
        list(size) if isinstance(size, (tuple, list)) else [size, size]
        for size in (stride, padding, dilation)
    )
    backend_flags = (False, False, False, False)
    return torch._convolution(
        input, weight, bias, stride, padding, dilation, False, [0, 0], groups, *backend_flags
    )


def _is_large(value: Any) -> bool:
    # The number of elements is a plain number even while tracing.
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= _LARGE


def _makes_view(func: Any) -> bool:
    if torch.Tag.inplace_view in func.tags:  # such as unsqueeze_
        return True
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@torch.no_grad()
def _zeros_like_result(func: Any, args: Any, kwargs: Any) -> Any:
    """Zeros of the shapes that an operator would return."""

    def without_values(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.zeros((), dtype=value.dtype).expand(value.shape)

    if "device" in kwargs:
        kwargs = {**kwargs, "device": "meta"}
    result = func(*tree_map(without_values, args), **tree_map(without_values, kwargs))
    return tree_map(zeros, result)
