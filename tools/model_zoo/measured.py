"""The numbers measured here: what `analyze_model`, `benchmark` and evaluations left in files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficient_detr.errors import UserError
from tools.model_zoo.schema import (
    EMPTY,
    FACTS,
    FINITE,
    IMAGE_SIZE,
    NUMBER,
    POSITIVE,
    TEXT,
    TEXTS,
    TRUTH,
    WHOLE,
    OrNull,
    Schema,
    complaint,
)

Size = tuple[int, int]  # height and width in pixels
Entries = dict[Size, dict[str, dict[str, Any]]]  # size -> model -> what was measured
Origins = dict[tuple[Size, str], Path]

Measured = tuple[str, tuple[str, ...]]
"""The name of a config, and with which overrides it is measured."""

# What makes latencies comparable, besides the machine.
SETTINGS = ("machine", "batch_size", "precision", "compile")

_ANALYSIS: Schema = {
    "image_size": IMAGE_SIZE,
    "overrides?": TEXTS,
    "checkpoint?": EMPTY,
    "configs": {
        "*": {
            "gflops": {"total": POSITIVE, "*": FINITE},
            "parameters": {"total": WHOLE},
            "data?": {"*": FINITE},
            "overrides?": TEXTS,
            "checkpoint?": EMPTY,
        }
    },
}
_TIMING: Schema = {
    "ms": POSITIVE,
    "cpu_ms?": OrNull(POSITIVE),
    # What is left for other stages is a difference of measured times, which may be below 0.
    "stages": {"*": {"ms": FINITE, "cpu_ms?": OrNull(FINITE)}},
}
_BENCHMARK: Schema = {
    "image_size": IMAGE_SIZE,
    "overrides?": TEXTS,
    "checkpoint?": EMPTY,
    "machine": FACTS,
    "batch_size": WHOLE,
    "precision": TEXT,
    "compile": TRUTH,
    "configs": {
        "*": {
            "inference": OrNull(_TIMING),  # null if the model ran out of memory
            "overrides?": TEXTS,
            "checkpoint?": EMPTY,
        }
    },
}
# Scores of classes and of sizes that no box has are null.
_RESULTS: Schema = {
    "bbox": {"AP": NUMBER, "*": OrNull(NUMBER)},
    "flops?": {"parameters?": NUMBER, "GFLOPs?": NUMBER},
}


@dataclass(frozen=True)
class Measurements:
    """What one kind of tool measured, in any number of runs.

    Attributes:
        entries: for each image size and each model what the tool wrote about it.
        origins: the file of each entry.
        settings: what all runs have in common, among them the machine; empty for analyses.
    """

    entries: Entries = field(default_factory=dict)
    origins: Origins = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def at(self, size: Size) -> dict[str, dict[str, Any]]:
        """Entries by model, for images of this size; empty if none was measured."""
        return self.entries.get(size, {})

    def in_one_run(self, size: Size, config: str, other: str) -> bool:
        """Whether both were measured at this size in the same run."""
        run = self.origins.get((size, config))
        return run is not None and run == self.origins.get((size, other))


def read_analyses(paths: Sequence[Path], models: Mapping[Measured, str]) -> Measurements:
    """Read files of `tools/analyze_model.py --json`.

    Args:
        paths: the files.
        models: names of the models by what is measured.

    Raises:
        UserError: a file is not one of these, is about something else, or says another time what an
            earlier one has said.
    """
    return Measurements(*_read_all(paths, models, _ANALYSIS, "tools/analyze_model.py"))


def read_benchmarks(paths: Sequence[Path], models: Mapping[Measured, str]) -> Measurements:
    """Read files of `tools/benchmark.py --json`; all must come from one machine and one setting.

    Args:
        paths: the files.
        models: names of the models by what is measured.

    Raises:
        UserError: as `read_analyses`, or the runs are not comparable.
    """
    entries, origins = _read_all(paths, models, _BENCHMARK, "tools/benchmark.py")
    timed = {
        size: {name: entry for name, entry in found.items() if entry["inference"] is not None}
        for size, found in entries.items()
    }
    settings: dict[str, Any] = {}
    for number, path in enumerate(paths):
        found = {name: value for name, value in _load(path).items() if name in SETTINGS}
        if number and found != settings:
            different = [name for name in SETTINGS if found.get(name) != settings.get(name)]
            raise UserError(
                f"{paths[0]} and {path} differ in {', '.join(different)}, so that their latencies "
                f"cannot be compared: measure both again in the same way."
            )
        settings = found
    return Measurements(timed, origins, settings)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Read the `results.json` of an evaluation: `bbox` with scores in percent, `flops` with costs.

    Raises:
        UserError: the file is none.
    """
    content = _load(path)
    _check(content, _RESULTS, path, "give the results.json of an evaluation of boxes")
    return {"bbox": content["bbox"], "flops": content.get("flops", {})}


def _read_all(
    paths: Sequence[Path], models: Mapping[Measured, str], schema: Schema, tool: str
) -> tuple[Entries, Origins]:
    entries, origins = Entries(), Origins()
    for path in paths:
        content = _load(path)
        _check(content, schema, path, f"measure again with {tool} --image-size ... --json")
        height, width = content["image_size"]
        size = (height, width)
        for config, entry in content["configs"].items():
            changes = [*content.get("overrides", []), *entry.get("overrides", [])]
            name = _name(config, changes, models, path)
            earlier = origins.setdefault((size, name), path)
            if earlier != path:
                raise UserError(
                    f"{earlier} and {path} both have {name} at {height}x{width}: "
                    f"leave one of them out."
                )
            entries.setdefault(size, {})[name] = entry
    return entries, origins


def _name(config: str, changes: Sequence[str], models: Mapping[Measured, str], path: Path) -> str:
    """The name of what was measured."""
    if (config, ()) not in models:
        raise UserError(
            f"{path} is about {config}, which is none of the full-size configs in configs/: "
            f"delete the file and measure these."
        )
    name = models.get((config, tuple(dict.fromkeys(changes))))
    if name is None:
        raise UserError(
            f"{path} is about {config} with the overrides {' '.join(changes)}, which are none of "
            f"the variants of published_figures.yaml: measure again without --opts."
        )
    return name


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): run make zoo.") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): delete it and measure again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: delete it and measure again.")
    return content


def _check(content: Mapping[str, Any], schema: Schema, path: Path, remedy: str) -> None:
    fault = complaint(content, schema)
    if fault:
        raise UserError(f"{path} cannot be used, because {fault}: {remedy}.")
