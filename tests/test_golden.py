"""Numbers of the official implementations, tensor by tensor.

Every fixture in the folders given by `--golden` (by default `tests/golden`) is read. What to build
and what to compare comes from the `family`, `mode`, `weights` and `config` of its JSON; see
`tests/golden_families`. Each tensor that a fixture lists must be compared: the test fails on one
that nobody looked at. Only in folders of others is an unknown intermediate result a mere warning.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden_families import FAMILIES, compare
from tests.golden_families.fixture import Comparison, Fixture

GOLDEN = Path(__file__).parent / "golden"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folders: list[Path] = metafunc.config.getoption("golden")
        for folder in folders:
            if not any(folder.glob("*.json")):
                raise pytest.UsageError(f"--golden: no fixtures (*.json) in {folder}")
        files = [file for folder in folders for file in sorted(folder.glob("*.json"))]
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])


def test_golden(golden_file: Path) -> None:
    ours = golden_file.parent.resolve() == GOLDEN.resolve()
    compare(Comparison(Fixture.load(golden_file), strict=ours))


def test_default_fixtures_are_complete() -> None:
    families = {json.loads(file.read_text())["family"] for file in GOLDEN.glob("*.json")}
    assert families == FAMILIES.keys()


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"family": "fcos", "mode": "eval"}, "unknown family 'fcos' of a golden fixture: know"),
        ({"family": "dino", "mode": "export"}, "unknown mode 'export' .* know .'eval', 'train'"),
    ],
)
def test_unknown_kinds_fail(info: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(Comparison(Fixture(info, tensors={})))
