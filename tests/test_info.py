"""`python -m efficient_detr.info`: what is installed here and what would run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from efficient_detr import info
from efficient_detr.ops import library
from efficient_detr.ops.library import KernelLoader

# An operator of the project's namespace that nobody has compiled.
OPERATOR = "operator_of_test_info"


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.ENVIRONMENT_VARIABLE, raising=False)
    # Before a test adds an operator, which they would be found to lack from then on.
    library.load()


@pytest.fixture
def operator() -> Iterator[str]:
    with torch.library._scoped_library(library.NAMESPACE, "FRAGMENT") as operators:
        operators.define(f"{OPERATOR}(Tensor x) -> Tensor")
        yield OPERATOR


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(library, "_loader", KernelLoader(tmp_path))
    return tmp_path


def test_the_table_names_versions_and_operators(
    operator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    for expected in (torch.__version__, "Detectron2", "numpy", "GPU", operator):
        assert expected in printed


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(info.collect()))
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"]["cpu"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert set(found["kernels"]) == {"cpu", "cuda"}


def test_nothing_built(
    nothing_built: Path, operator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "no C++ compiler was found"
    record = {"torch": None, "cpu": {"state": "not possible", "reason": reason}}
    (nothing_built / "_kernels_build.json").write_text(json.dumps(record))
    described = info.describe_operators()[operator]
    assert described["built"] == []
    assert described["runs"]["cpu"] == "pytorch"
    assert reason in described["why"]["cpu"]
    assert info.main([]) == 0
    assert f"the CPU kernels are not built: {reason}" in capsys.readouterr().out


def test_an_impossible_wish_is_shown_and_not_raised(
    nothing_built: Path, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "compiled")
    described = info.describe_operators()[operator]
    assert described["runs"]["cpu"] == "fails"
    assert "asked for on cpu" in described["why"]["cpu"]
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "fastest")
    assert "it can be auto" in info.describe_operators()[operator]["why"]["cpu"]
    assert info.collect()["environment"][library.ENVIRONMENT_VARIABLE] == "fastest"


def test_pytorch_by_wish_is_told_from_pytorch_by_need(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "choose", lambda device: "pytorch")
    monkeypatch.setattr(library, "missing_reason", lambda device: "")
    assert info.describe_operators()[operator]["why"]["cpu"] == "EFFICIENT_DETR_OPS=pytorch"


def test_an_operator_newer_than_the_shared_object_is_noticed(
    nothing_built: Path, operator: str
) -> None:
    built = Path(torch.__file__).parent / "lib"
    (nothing_built / "_kernels_cpu.abi3.so").symlink_to(next(built.glob("libc10.*")))
    described = info.describe_operators()[operator]
    assert described["built"] == []
    assert described["runs"]["cpu"] == "pytorch"
    assert "older sources, without " in described["why"]["cpu"]
    assert operator in described["why"]["cpu"]


@pytest.mark.parametrize(
    "content",
    ['{"cpu": "built", "cuda": 3}', '{"cpu": {"state": "built", "flags": [1]}, "torch": 5}'],
)
def test_a_record_of_another_form_is_none(
    nothing_built: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (nothing_built / "_kernels_build.json").write_text(content)
    assert info.main([]) == 0
    assert "the CPU kernels are not built: the package was not" in capsys.readouterr().out
    assert info.collect()["build"] == {}


def test_the_record_of_the_build_is_shown(nothing_built: Path) -> None:
    entry = {"state": "built", "compiler": "g++ 12", "flags": ["-O3", "-std=c++20"]}
    record = {"torch": "2.13.0+cpu", "cpu": entry}
    (nothing_built / "_kernels_build.json").write_text(json.dumps(record))
    text = info.render(info.collect())
    assert "-O3 -std=c++20" in text
    assert "g++ 12" in text
    assert info.collect()["build"] == record
