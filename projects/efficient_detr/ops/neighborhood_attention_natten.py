"""Neighbourhood attention by the library `natten`, where one is installed that can do it.

What is needed is a position bias that is learned, and natten has had it under several names:

- 0.14.5 to 0.16: `natten2dqkrpb(query, key, rpb, kernel_size, dilation)` and `natten2dav`;
- 0.17: `na2d_qk(..., rpb=...)` and `na2d_av`;
- older ones take no kernel size, and 0.20 gave up the bias.

So it is the functions and their parameters that decide, not the version.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efficient_detr.ops import neighborhood_attention_pytorch as in_pytorch
from efficient_detr.ops.library import ENVIRONMENT_VARIABLE

_logger = logging.getLogger(__name__)

Logits = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Query, key (B, heads, H, W, D), table and k to logits (B, heads, H, W, k * k)."""

WeightedSum = Callable[[Tensor, Tensor, int], Tensor]
"""Weights, value and k to (B, heads, H, W, D)."""


class _UnsuitableError(Exception):
    """What natten cannot do, as a clause."""


def uses_natten(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether natten is installed, can do what is needed, and is not declined.

    `EFFICIENT_DETR_OPS=pytorch` declines it. The decision is logged once for each type of device
    and dtype.

    Args:
        device: where the maps are.
        dtype: of the maps.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "pytorch":
        return False
    return _is_usable(device.type, dtype)


def attend_with_natten(
    query: Tensor, key: Tensor, value: Tensor, position_bias_table: Tensor
) -> Tensor:
    """Neighbourhood attention; see `ops.neighborhood_attention`."""
    kernel_size = (position_bias_table.shape[-1] + 1) // 2
    logits, weighted_sum = _functions()
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = (
            features.permute(0, 3, 1, 2, 4).contiguous() for features in (query, key, value)
        )
        table = position_bias_table.to(query.dtype)
        weights = logits(query * query.shape[-1] ** -0.5, key, table, kernel_size).softmax(-1)
        return weighted_sum(weights, value, kernel_size).permute(0, 2, 3, 1, 4)


@functools.cache
def _is_usable(device_type: str, dtype: torch.dtype) -> bool:
    """Look for the library and try it; the outcome stays for the life of the process."""
    try:
        _functions()
        problem = _trial(device_type, dtype)
    except ModuleNotFoundError as error:
        if error.name == "natten":
            return False
        problem = f"cannot be imported ({error})"
    except _UnsuitableError as error:
        problem = str(error)
    except Exception as error:  # a library for another torch may fail in any way
        first_line = str(error).partition("\n")[0] or type(error).__name__
        problem = f"fails ({first_line})"
    place = f"on {device_type} in {str(dtype).removeprefix('torch.')}"
    if problem:
        _logger.warning(
            "Neighbourhood attention %s uses plain PyTorch, because the installed natten %s %s.",
            place,
            _version(),
            problem,
        )
    else:
        _logger.info("Neighbourhood attention %s uses natten %s.", place, _version())
    return not problem


def _trial(device_type: str, dtype: torch.dtype) -> str:
    """Compute a small case, forward and backward; what is wrong with it as a clause, or ""."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 5, 2, 32)] * 3 + [(2, 5, 5)]
    with torch.inference_mode(False):
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        values = [value.to(device_type, dtype) for value in values]
    found = _with_gradients(attend_with_natten, values)
    expected = _with_gradients(in_pytorch.attend, [value.float() for value in values])
    # Coarse enough for every dtype; keys or biases out of order are off by far more.
    errors = [(one.float() - other).abs().max() for one, other in zip(found, expected, strict=True)]
    scales = [other.abs().max() for other in expected]
    close = all(error < 0.03 * scale for error, scale in zip(errors, scales, strict=True))
    return "" if close else "gives other results"


def _with_gradients(attend: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
    """Output and gradients, also where the model that asks runs without them or under autocast."""
    autocast = torch.autocast(values[0].device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), autocast:
        arguments = [value.clone().requires_grad_() for value in values]
        output = attend(*arguments)
        return [output, *torch.autograd.grad(output.square().sum(), arguments)]


@functools.cache
def _functions() -> tuple[Logits, WeightedSum]:
    """The two functions of the library in one form.

    Raises:
        ModuleNotFoundError: if there is no natten.
        _UnsuitableError: if it cannot add a position bias.
        Exception: whatever the library raises when it is imported.
    """
    importlib.import_module("natten")  # where that fails, the library is not there at all
    module = importlib.import_module("natten.functional")
    if "rpb" in _parameters(module, "na2d_qk"):
        return _of_release_17(module)
    names = ["query", "key", "rpb", "kernel_size", "dilation"]
    if _parameters(module, "natten2dqkrpb")[:5] == names:
        return _of_release_14(module)
    raise _UnsuitableError("cannot add a learned position bias; versions 0.14.5 to 0.17 can")


def _parameters(module: ModuleType, name: str) -> list[str]:
    function = getattr(module, name, None)
    return [] if function is None else list(inspect.signature(function).parameters)


def _of_release_17(module: Any) -> tuple[Logits, WeightedSum]:
    def logits(query: Tensor, key: Tensor, table: Tensor, kernel_size: int) -> Tensor:
        result: Tensor = module.na2d_qk(query, key, kernel_size=kernel_size, dilation=1, rpb=table)
        return result

    def weighted_sum(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
        result: Tensor = module.na2d_av(weights, value, kernel_size=kernel_size, dilation=1)
        return result

    return logits, weighted_sum


def _of_release_14(module: Any) -> tuple[Logits, WeightedSum]:
    def logits(query: Tensor, key: Tensor, table: Tensor, kernel_size: int) -> Tensor:
        result: Tensor = module.natten2dqkrpb(query, key, table, kernel_size, 1)
        return result

    def weighted_sum(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
        result: Tensor = module.natten2dav(weights, value, kernel_size, 1)
        return result

    return logits, weighted_sum


def _version() -> str:
    try:
        return importlib.metadata.version("natten")
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"
