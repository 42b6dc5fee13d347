"""The numbers measured here: what `analyze_model`, `benchmark` and evaluations left in files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficient_detr.errors import UserError

Size = tuple[int, int]  # height and width in pixels
Entries = dict[Size, dict[str, dict[str, Any]]]  # size -> config -> what was measured

Origins = dict[tuple[Size, str], Path]

# What makes latencies comparable, besides the machine.
SETTINGS = ("machine", "batch_size", "precision", "compile")


@dataclass(frozen=True)
class Measurements:
    """What one kind of tool measured, in any number of runs.

    Attributes:
        entries: for each image size and each config what the tool wrote about it.
        origins: the file of each entry.
        settings: what all runs have in common, among them the machine; empty for analyses.
    """

    entries: Entries = field(default_factory=dict)
    origins: Origins = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def at(self, size: Size) -> dict[str, dict[str, Any]]:
        """Entries by config, for images of this size; empty if none was measured."""
        return self.entries.get(size, {})

    def in_one_run(self, size: Size, config: str, other: str) -> bool:
        """Whether both were measured at this size in the same run."""
        run = self.origins.get((size, config))
        return run is not None and run == self.origins.get((size, other))


def read_analyses(paths: Sequence[Path], configs: Iterable[str]) -> Measurements:
    """Read files of `tools/analyze_model.py --json`.

    Args:
        paths: the files.
        configs: the configs that exist.

    Raises:
        UserError: a file is not one of these, knows configs that do not exist, or says another time
            what an earlier one has said.
    """
    return Measurements(*_read_all(paths, configs, "gflops", "tools/analyze_model.py"))


def read_benchmarks(paths: Sequence[Path], configs: Iterable[str]) -> Measurements:
    """Read files of `tools/benchmark.py --json`; all must come from one machine and one setting.

    Args:
        paths: the files.
        configs: the configs that exist.

    Raises:
        UserError: as `read_analyses`, or the runs are not comparable.
    """
    entries, origins = _read_all(paths, configs, "inference", "tools/benchmark.py")
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
    return Measurements(entries, origins, settings)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Read the `results.json` of an evaluation: `bbox` with scores in percent, `flops` with costs.

    Raises:
        UserError: the file is none.
    """
    content = _load(path)
    if not isinstance(content.get("bbox"), dict):
        raise UserError(f"{path} holds no box AP: give the results.json of an evaluation.")
    return {"bbox": content["bbox"], "flops": content.get("flops", {})}


def _read_all(
    paths: Sequence[Path], configs: Iterable[str], key: str, tool: str
) -> tuple[Entries, Origins]:
    """Entries that have something under a key; for those that could not be measured it is null."""
    known, entries, origins = set(configs), Entries(), Origins()
    for path in paths:
        content = _load(path)
        size = _size(content, path, tool)
        for config, entry in _configs(content, key, path, tool).items():
            if config not in known:
                raise UserError(
                    f"{path} is about {config}, which configs/ does not have (any more): "
                    f"delete the file and measure again."
                )
            earlier = origins.setdefault((size, config), path)
            if earlier != path:
                raise UserError(
                    f"{earlier} and {path} both have {config} at {size[0]}x{size[1]}: "
                    f"leave one of them out."
                )
            if entry[key] is not None:
                entries.setdefault(size, {})[config] = entry
    return entries, origins


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


def _size(content: Mapping[str, Any], path: Path, tool: str) -> Size:
    size = content.get("image_size")
    if isinstance(size, list) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise UserError(
        f"{path} does not say for which size of images it is: run {tool} with --image-size."
    )


def _configs(
    content: Mapping[str, Any], key: str, path: Path, tool: str
) -> Mapping[str, dict[str, Any]]:
    configs = content.get("configs")
    if not isinstance(configs, dict) or not all(
        isinstance(entry, dict) and key in entry for entry in configs.values()
    ):
        raise UserError(f'{path} has no "{key}" of configs: it must be a file of {tool} --json.')
    return configs
