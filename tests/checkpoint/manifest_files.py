"""Lists of the keys and shapes in published checkpoints, in a form that is small enough to commit.

A manifest is a JSON file with these entries:

* `source`: whose model the list was taken from;
* `tensors`: key -> shape. Braces stand for each of several parts of a key: `{0..5}` for numbers,
  `{bias,weight}` for words;
* `aliases`: a module or tensor -> another one whose tensors it shares, so that they are stored
  twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from efficient_detr.checkpoint.convert import convert_checkpoint, export_checkpoint
from efficient_detr.checkpoint.formats import FORMATS

Shape = tuple[int, ...]

MANIFESTS = Path(__file__).parent / "manifests"


@dataclass(frozen=True)
class Manifest:
    """What a published checkpoint holds.

    Attributes:
        shapes: key -> shape of every tensor.
        aliases: key -> the key whose tensor is stored there once more.
        source: whose model the list was taken from.
    """

    shapes: dict[str, Shape]
    aliases: dict[str, str] = field(default_factory=dict)
    source: str = ""


def manifest_names(pattern: str = "*") -> list[str]:
    """Names of the manifests that a pattern with `*` stands for."""
    return sorted(path.stem for path in MANIFESTS.glob(f"{pattern}.json"))


def load_manifest(name: str) -> Manifest:
    """Read `manifests/<name>.json`."""
    stored = json.loads((MANIFESTS / f"{name}.json").read_text())
    shapes = {
        key: tuple(shape) for group, shape in stored["tensors"].items() for key in _expanded(group)
    }
    aliases = {
        key: source + key[len(module) :]
        for module, source in stored.get("aliases", {}).items()
        for key in shapes
        if key == module or key.startswith(f"{module}.")
    }
    return Manifest(shapes, aliases, stored["source"])


def random_state(manifest: Manifest, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with random values.

    Args:
        manifest: its keys and shapes.
        seed: equal seeds give equal values.

    Returns:
        key -> float32 tensor, or an int64 one where batches are counted; aliases are the tensors
        that they are copies of.
    """
    generator = torch.Generator().manual_seed(seed)
    own = {
        key: torch.tensor(1000)
        if key.endswith("num_batches_tracked")
        else torch.rand(shape, generator=generator)
        for key, shape in manifest.shapes.items()
        if key not in manifest.aliases
    }
    return {key: own[manifest.aliases.get(key, key)] for key in manifest.shapes}


def meta_state(manifest: Manifest) -> dict[str, Tensor]:
    """A checkpoint without storage."""
    return {key: torch.empty(shape, device="meta") for key, shape in manifest.shapes.items()}


def check_format(
    name: str,
    format_name: str,
    build_model: Callable[[], nn.Module],
    given: Mapping[str, Tensor] | None = None,
) -> None:
    """A checkpoint is recognised, fills the model without rest and is written back as it was.

    Args:
        name: of the manifest.
        format_name: of the only format that its keys should fit.
        build_model: makes the model; its weights need no storage.
        given: key -> values that are not free, such as constants.
    """
    manifest = load_manifest(name)
    assert [one.name for one in FORMATS if one.fits(manifest.shapes)] == [format_name]
    state = random_state(manifest) | dict(given or {})
    model = build_model()
    conversion = convert_checkpoint(state, model=model)
    assert conversion.format is not None and conversion.format.name == format_name
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in conversion.state.items()} == ours
    written = export_checkpoint(conversion.state, format_name)
    assert written.keys() == state.keys()
    assert [key for key in state if not torch.equal(written[key], state[key])] == []


# Writing -----------------------------------------------------------------------------------------


def save_manifest(name: str, manifest: Manifest) -> None:
    """Write `manifests/<name>.json`, one group of keys a line."""
    entries = [
        f'"source": {json.dumps(manifest.source)}',
        _block("tensors", {group: list(shape) for group, shape in _groups(manifest.shapes)}),
    ]
    if manifest.aliases:
        entries.append(_block("aliases", _shared_modules(manifest)))
    (MANIFESTS / f"{name}.json").write_text("{\n" + ",\n".join(entries) + "\n}\n")
    assert load_manifest(name) == Manifest(
        {key: tuple(shape) for key, shape in manifest.shapes.items()},
        dict(manifest.aliases),
        manifest.source,
    )


def _block(name: str, rows: Mapping[str, object]) -> str:
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items()]
    return f'"{name}": {{\n' + ",\n".join(lines) + "\n}"


def _groups(shapes: Mapping[str, Shape]) -> Iterable[tuple[str, Shape]]:
    """Keys of equal shape, joined where they differ in one part only, with that shape."""
    groups = [([{part} for part in key.split(".")], tuple(shapes[key])) for key in shapes]
    for place in range(-1, -max((len(parts) for parts, _ in groups), default=0) - 1, -1):
        joined: dict[object, tuple[list[set[str]], Shape]] = {}
        for parts, shape in groups:
            if len(parts) < -place:
                joined[str(parts)] = (parts, shape)
                continue
            others = [frozenset(part) for part in parts]
            others[place] = frozenset()
            first, _ = joined.setdefault((tuple(others), shape), (parts, shape))
            first[place] = first[place] | parts[place]
        groups = list(joined.values())
    return sorted((".".join(map(_braced, parts)), shape) for parts, shape in groups)


def _braced(parts: set[str]) -> str:
    """`{0..5}`, `{bias,weight}` or the only part."""
    numbers = sorted(int(part) for part in parts if part.isdigit())
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    pieces = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    pieces += sorted(part for part in parts if not part.isdigit())
    return pieces[0] if len(parts) == 1 else "{" + ",".join(pieces) + "}"


def _shared_modules(manifest: Manifest) -> dict[str, str]:
    """The outermost modules of which everything is stored once more, and what they are."""
    found: dict[str, str] = {}
    for key in manifest.aliases:
        if any(key.startswith(f"{module}.") for module in found):
            continue
        parts = key.split(".")
        modules = (".".join(parts[: end + 1]) for end in range(len(parts)))
        module, source = next(
            (module, source) for module in modules if (source := _shares(manifest, module, key))
        )
        found[module] = source
    return found


def _shares(manifest: Manifest, module: str, key: str) -> str | None:
    """The module whose tensors are all those of another one; None if that is not so."""
    rest = key[len(module) :]
    if not manifest.aliases[key].endswith(rest):
        return None
    source = manifest.aliases[key].removesuffix(rest)
    inside = [key for key in manifest.shapes if key == module or key.startswith(f"{module}.")]
    same = all(manifest.aliases.get(key) == source + key[len(module) :] for key in inside)
    return source if same else None


# Reading -----------------------------------------------------------------------------------------


def _expanded(group: str) -> Iterable[str]:
    pieces = re.split(r"\{([^}]*)\}", group)
    choices = [
        [piece] if index % 2 == 0 else [one for run in piece.split(",") for one in _run(run)]
        for index, piece in enumerate(pieces)
    ]
    return map("".join, product(*choices))


def _run(piece: str) -> list[str]:
    first, dots, last = piece.partition("..")
    return [str(number) for number in range(int(first), int(last) + 1)] if dots else [piece]
