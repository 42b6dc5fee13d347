"""The compact form of lists of keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoint import manifest_files
from tests.checkpoint.manifest_files import (
    Manifest,
    Shape,
    load_manifest,
    random_state,
    save_manifest,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(manifest_files, "MANIFESTS", tmp_path)
    return tmp_path


def test_braces_stand_for_keys(folder: Path) -> None:
    stored = {
        "source": "a repository",
        "tensors": {"layers.{0..2,5}.{bias,norm.weight}": [4], "scale": []},
        "aliases": {"layers.2": "layers.0"},
    }
    (folder / "some.json").write_text(json.dumps(stored))
    names = [f"layers.{layer}.{name}" for layer in (0, 1, 2, 5) for name in ("bias", "norm.weight")]
    manifest = load_manifest("some")
    assert manifest.shapes == dict.fromkeys(names, (4,)) | {"scale": ()}
    assert manifest.aliases == {
        "layers.2.bias": "layers.0.bias",
        "layers.2.norm.weight": "layers.0.norm.weight",
    }


def test_what_is_saved_is_loaded(folder: Path) -> None:
    shapes: dict[str, Shape] = {
        f"layers.{layer}.{kind}": (2, 3) for layer in (0, 1, 3, 10) for kind in "ab"
    }
    shapes |= {"layers.10.a": (5,), "layers.3.norm.c": (2, 3), "weight": ()}
    aliases = {"layers.1.a": "layers.0.a", "layers.1.b": "layers.0.b", "layers.10.b": "layers.3.b"}
    save_manifest("some", Manifest(shapes, aliases, "a repository"))
    assert load_manifest("some") == Manifest(shapes, aliases, "a repository")
    stored = json.loads((folder / "some.json").read_text())
    assert stored["tensors"]["layers.{0..1,3}.{a,b}"] == [2, 3]
    assert stored["aliases"] == {"layers.1": "layers.0", "layers.10.b": "layers.3.b"}


def test_random_values_are_shared_by_aliases() -> None:
    manifest = Manifest({"a": (2, 2), "b": (2, 2), "c": (2, 2), "n.num_batches_tracked": ()})
    shared = Manifest(manifest.shapes, {"a": "b"})
    state, again, other = (random_state(shared, seed) for seed in (3, 3, 4))
    assert state["a"] is state["b"] and not torch.equal(state["b"], state["c"])
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert not torch.equal(other["c"], state["c"])
    assert state["n.num_batches_tracked"].dtype == torch.int64
