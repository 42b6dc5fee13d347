"""What a golden fixture holds, and how to compare with it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from efficient_detr.structures import Targets

# Absolute and relative tolerance of a forward pass in float32.
FORWARD = 1e-4

# Groups of tensors that a fixture gives rather than expects.
GIVEN = ("weights/", "inputs/", "w/", "in/", "loss/target.")

Reader = Callable[..., Tensor]
"""Our value of a tensor; called with the groups of the pattern of its name, numbers as integers."""


@dataclass(frozen=True)
class Fixture:
    """A golden fixture: what its JSON says and what its tensors hold.

    The layout is that of the DETR family: `inputs/image_mask`, `inputs/feat.<level>`,
    `loss/target.<image>.<labels or boxes>` and `weights/<official key>`.
    """

    info: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, json_path: Path) -> Fixture:
        info = json.loads(json_path.read_text())
        tensors = load_file(json_path.with_suffix(".safetensors"))
        missing = sorted(set(info.get("tensors") or ()) - tensors.keys())
        if missing:
            raise ValueError(f"{json_path} lists tensors that its safetensors lack: {missing}")
        return cls(info, tensors)

    @property
    def config(self) -> dict[str, Any]:
        return self.info["config"]

    @property
    def expected_names(self) -> set[str]:
        """Names of the tensors to compare."""
        return {name for name in self.tensors if not name.startswith(GIVEN)}

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start with a prefix, named without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    @property
    def padding_mask(self) -> Tensor:
        """(B, H, W) bool, True on padding."""
        return self.tensors["inputs/image_mask"]

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each unpadded image, in pixels."""
        valid = ~self.padding_mask
        heights, widths = valid[:, :, 0].sum(1).tolist(), valid[:, 0].sum(1).tolist()
        return list(zip(heights, widths, strict=True))

    @property
    def original_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image before resizing: what final detections are scaled to."""
        one = self.group("inputs/orig_size_hw.")
        sizes = [one[str(i)] for i in range(len(one))] or self.tensors["inputs/orig_size_hw"]
        return [(int(size[0]), int(size[1])) for size in sizes]

    @property
    def images(self) -> Tensor:
        """Images that nobody looks at: the backbone's maps are stored."""
        batch, height, width = self.padding_mask.shape
        return torch.zeros(batch, 3, height, width)

    @property
    def targets(self) -> list[Targets]:
        return [
            Targets(
                labels=self.tensors[f"loss/target.{image}.labels"].long(),
                boxes=self.tensors[f"loss/target.{image}.boxes"].reshape(-1, 4),
                image_size=size,
            )
            for image, size in enumerate(self.image_sizes)
        ]

    def weights(self) -> dict[str, Tensor]:
        """Official key -> tensor, with every key that the official model stores twice."""
        kind = self.info.get("weights", "stored")
        if kind == "recipe":
            state = recipe_weights(self.info["weight_recipe"]["params"])
        elif kind == "stored":
            state = self.group("weights/")
        else:
            raise ValueError(f"unknown weights {kind!r} of a golden fixture: know stored, recipe")
        return self.with_aliases(state)

    def with_aliases(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by official key, repeated for the keys that share a tensor with another."""
        aliases = self.info.get("weight_aliases", {})
        repeated = {alias: values[key] for alias, key in aliases.items() if key in values}
        return {**values, **repeated}


def recipe_weights(params: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Weights drawn with numpy, each from a seed of its own, in float64."""
    state = {}
    for key, row in params.items():
        draw = np.random.RandomState(row["seed"]).standard_normal(row["shape"])
        state[key] = torch.from_numpy(np.asarray(draw * row["std"] + row["mean"])).float()
    return state


class Comparison:
    """Compares by name and remembers what was compared.

    Args:
        fixture: the expected tensors.
        strict: an intermediate tensor (`inter/`) that no comparison knows is a failure, not a
            warning. Any other unknown tensor always is.
    """

    def __init__(self, fixture: Fixture, *, strict: bool = True) -> None:
        self.fixture = fixture
        self.strict = strict
        self.compared: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self.fixture.tensors

    def expect(self, name: str) -> Tensor:
        """The expected tensor, which from now on counts as compared."""
        self.compared.add(name)
        return self.fixture.tensors[name]

    def close(self, name: str, actual: Tensor, atol: float, rtol: float = 0.0) -> None:
        expected = self.expect(name)
        assert actual.shape == expected.shape, f"{name}: {actual.shape} for {expected.shape}"
        torch.testing.assert_close(
            actual.detach(), expected, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}"
        )

    def equal(self, name: str, actual: Tensor) -> None:
        expected = self.expect(name)
        assert actual.shape == expected.shape, f"{name}: {actual.shape} for {expected.shape}"
        assert torch.equal(actual.long(), expected.long()), name

    def same_set(self, name: str, actual: Tensor, expected: Tensor) -> None:
        assert torch.equal(actual.sort(1).values, expected.long().sort(1).values), name

    def matches(self, pattern: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Names to compare that match a pattern, each with the groups, numbers as integers."""
        for name in sorted(self.fixture.expected_names):
            if match := re.fullmatch(pattern, name):
                yield name, tuple(int(g) if g and g.isdigit() else g for g in match.groups())

    def read(
        self, readers: Mapping[str, Reader], atol: float = FORWARD, rtol: float = FORWARD
    ) -> None:
        """Compare every tensor whose name matches a pattern with what its reader returns.

        Floating-point tensors must be close, others equal.
        """
        for pattern, reader in readers.items():
            for name, groups in self.matches(pattern):
                if self.fixture.tensors[name].is_floating_point():
                    self.close(name, reader(*groups), atol, rtol)
                else:
                    self.equal(name, reader(*groups))

    def finish(self) -> None:
        """Every tensor must have been compared."""
        assert self.fixture.expected_names, "the fixture lists no tensors"
        left = self.fixture.expected_names - self.compared
        unknown = {name for name in left if name.startswith("inter/")}
        if unknown and not self.strict:
            warnings.warn(f"not compared: {sorted(unknown)}", stacklevel=2)
            left -= unknown
        assert left == set(), "tensors that no comparison looked at"


def rows_of(indices: Tensor, wanted: Tensor) -> Tensor:
    """(B, N) rows at which `indices` (B, N) holds each entry of `wanted` (B, N), image by image."""
    order = indices.argsort(1)
    return order.gather(1, torch.searchsorted(indices.gather(1, order), wanted))
