"""What a benchmark case is: implementations of the same work, and the exact result to check them.

Building a case draws its inputs, which may take hundreds of megabytes; a `Plan` is what is known
without that, so that cases can be listed and picked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COMPILED = "compiled"
"""The contender that the project's own kernels make."""


@dataclass(frozen=True)
class Contender:
    """One implementation of a case's work.

    Attributes:
        run: does the work once; this is what is timed.
        result: does it once and returns what is compared with the exact result; None if the
            contender does something that the exact result does not describe.
        ours: whether a wrong result is an error of this project.
    """

    run: Callable[[], object]
    result: Callable[[], list[Tensor]] | None
    ours: bool = True


@dataclass(frozen=True)
class Comparison:
    """One row of the report: time of the fastest reference divided by the time of `ours`.

    Attributes:
        name: of the row.
        ours: a contender.
        references: contenders.
        required: the ratio that is demanded of the row on a CPU, if any.
        is_part: whether `ours` is a part of the reference, so that the ratio says how small a part.
    """

    name: str
    ours: str
    references: tuple[str, ...]
    required: float | None = None
    is_part: bool = False


@dataclass(frozen=True)
class Case:
    """Everything that is needed to measure.

    Attributes:
        contenders: by name.
        exact: makes the float64 result.
        tolerance: largest allowed `relative_error`.
        compulsory_bytes: memory traffic of an implementation that reads each input once and writes
            each output once.
        missing: contenders that cannot take part, with the reason.
    """

    contenders: dict[str, Contender]
    exact: Callable[[], list[Tensor]]
    tolerance: float
    compulsory_bytes: int
    missing: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """A case that can be built.

    Attributes:
        title: what is computed, on which sizes.
        comparisons: the rows that come out of it.
        build: draws the inputs.
    """

    title: str
    comparisons: tuple[Comparison, ...]
    build: Callable[[], Case]


def relative_error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Largest difference, relative to the largest exact number of the same tensor.

    Args:
        results: tensors of any floating dtype.
        exact: float64 tensors of the same shapes.

    Returns:
        The worst of the tensors; infinity if a result is not finite.
    """
    worst = 0.0
    for result, truth in zip(results, exact, strict=True):
        if result.shape != truth.shape:
            raise ValueError(f"a result is {tuple(result.shape)} instead of {tuple(truth.shape)}")
        if not result.numel():
            continue
        if not bool(result.isfinite().all()):
            return float("inf")
        difference = (result.double() - truth).abs().max()
        worst = max(worst, float(difference / truth.abs().max().clamp_min(1e-30)))
    return worst


def byte_count(*tensors: Tensor) -> int:
    """Bytes of all elements together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous copies on a device."""
    return tuple(tensor.to(device).contiguous() for tensor in tensors)
