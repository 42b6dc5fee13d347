"""A model as a tree of its modules with their parameters, short enough to read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from tabulate import tabulate
from torch import nn

DEPTH = 4
"""Levels of modules that are shown below the model."""


def describe_structure(model: nn.Module, depth: int = DEPTH) -> str:
    """The modules of a model, indented, with their classes and numbers of parameters.

    Neighbours of equal structure share a line, as in ``0-5: 6 x TransformerEncoderLayer``, which
    says how many parameters each of them has. Modules without parameters are left out; a parameter
    that several modules share is counted in each.

    Args:
        model: on any device.
        depth: levels below the model, 0 or more.
    """
    rows = list(_rows("", [("", model)], depth))
    alignment = ("left", "right")
    return tabulate(rows, ["module", "parameters"], tablefmt="plain", colalign=alignment)


def _rows(indent: str, modules: list[tuple[str, nn.Module]], depth: int) -> Iterator[list[str]]:
    owners = [(name, module) for name, module in modules if any(True for _ in module.parameters())]
    for _, equal in groupby(owners, key=lambda item: _signature(item[1])):
        names, group = zip(*equal, strict=True)
        module, number = group[0], sum(p.numel() for p in group[0].parameters())
        title = type(module).__name__ if len(group) == 1 else f"{len(group)} x {_class(module)}"
        name = names[0] if len(group) == 1 else f"{names[0]}-{names[-1]}"
        each = " each" if len(group) > 1 else ""
        yield [f"{indent}{name}: {title}" if name else title, f"{number:,}{each}"]
        if depth > 0:
            # Tables drop spaces at the beginning.
            yield from _rows(
                f"{indent}\N{BOX DRAWINGS LIGHT VERTICAL} ", [*module.named_children()], depth - 1
            )


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _signature(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules of equal classes and shapes."""
    classes = tuple((name, type(part)) for name, part in module.named_modules())
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return classes, shapes
