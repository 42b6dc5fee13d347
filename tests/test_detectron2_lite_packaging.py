"""The source folder of detectron2_lite: its size, its build backend, and what it says is absent.

Whichever detectron2 is installed, these tests look at the folder.
"""

import ast
import importlib
import io
import os
import shutil
import subprocess
import sys
import tokenize
import zipfile
from collections.abc import Iterator
from importlib.metadata import PathDistribution
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parents[1] / "detectron2_lite"
MOST_LINES_OF_CODE = 3000  # blank lines, comments and docstrings not counted
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def _docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            lines.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return lines


def _lines_of_code(file: Path) -> int:
    """Lines with at least one token that is neither a comment nor part of a docstring."""
    source = file.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE and token.string:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - _docstring_lines(ast.parse(source)))


def test_only_code_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""A module\nof two lines."""\n\n# comment\nx = (\n    1,  # one\n\n)\n\n\n'
        'def f():\n    """Nothing."""\n    return """a\n\nb"""\n'
    )
    # x = (, 1, ), def and the three lines of the string that is no docstring.
    assert _lines_of_code(file) == 7


def test_it_stays_small() -> None:
    lines = sum(_lines_of_code(file) for file in SOURCE.rglob("*.py"))
    assert 1000 < lines <= MOST_LINES_OF_CODE


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The build backend in a copy of the folder, which the build writes to."""
    pytest.importorskip("setuptools", reason="the backend wraps setuptools")
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(SOURCE, tmp_path / "source", ignore=ignored)
    monkeypatch.chdir(tmp_path / "source")
    monkeypatch.syspath_prepend(str(tmp_path / "source" / "build_backend"))
    monkeypatch.delitem(sys.modules, "guarded_setuptools", raising=False)
    yield importlib.import_module("guarded_setuptools")
    sys.modules.pop("guarded_setuptools", None)


def _pretend_installed(folder: Path, version: str) -> None:
    information = folder / f"detectron2-{version}.dist-info"
    information.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: detectron2\nVersion: {version}\n"
    (information / "METADATA").write_text(text)


def _use_only(backend: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(backend, "package_directories", lambda: [str(folder)])


HOOKS = [
    "build_wheel",
    "build_editable",
    "prepare_metadata_for_build_wheel",
    "prepare_metadata_for_build_editable",
]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_real_detectron2_is_not_replaced(
    backend: ModuleType, hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_only(backend, tmp_path / "site", monkeypatch)
    _pretend_installed(tmp_path / "site", "0.6")
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match=r"real Detectron2 \(0\.6 in .*site"):
        getattr(backend, hook)(str(tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_a_linked_checkout_is_not_replaced(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_only(backend, tmp_path / "site", monkeypatch)
    (tmp_path / "site" / "detectron2.egg-link").write_text("/home/someone/detectron2\n.")
    with pytest.raises(SystemExit, match="egg-link"):
        backend.build_wheel(str(tmp_path))


def test_a_lite_one_can_be_built_again(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_only(backend, tmp_path / "site", monkeypatch)
    _pretend_installed(tmp_path / "site", "0.6.dev0+lite")
    wheel = tmp_path / "out" / backend.build_wheel(str(tmp_path / "out"))
    assert wheel.name == "detectron2-0.6.dev0+lite-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "unpacked")
    modules = {path.relative_to(SOURCE).as_posix() for path in SOURCE.glob("detectron2/**/*.py")}
    in_wheel = {name for name in names if not name.startswith("detectron2-")}
    assert in_wheel == modules | {"detectron2/py.typed"}
    metadata = PathDistribution(next((tmp_path / "unpacked").glob("*.dist-info"))).metadata
    assert (metadata["Name"], metadata["Version"]) == ("detectron2", "0.6.dev0+lite")
    assert "Private :: Do Not Upload" in metadata.get_all("Classifier", [])


def test_other_distributions_do_not_matter(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_only(backend, tmp_path / "site", monkeypatch)
    information = tmp_path / "site" / "detectron2_extras-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: detectron2-extras\nVersion: 1.0\n")
    backend.refuse_to_replace_real_detectron2()


def test_the_target_is_seen_under_build_isolation(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sysconfig

    target = sysconfig.get_paths()["purelib"]
    # pip takes the packages of the target off sys.path, but runs the target's interpreter.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != target])
    assert target in backend.package_directories()


def _python(code: str) -> str:
    """What a process says whose detectron2 is the source folder."""
    paths = [str(SOURCE), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


ABSENT = """
import importlib, io, pickle, pkgutil
import detectron2

def ask(code):
    try:
        exec(code, {})
    except Exception as error:
        print(type(error).__name__, "|", error)
    else:
        print("nothing raised by", code)

print(detectron2.__version__, detectron2.__lite__)
ask("from detectron2.config import get_cfg")
ask("from detectron2.engine.defaults import DefaultPredictor")
ask("from detectron2.modeling import GeneralizedRCNN")
ask("import detectron2.export")
ask("from detectron2 import model_zoo")
ask("import detectron2.model_zoo.configs")
ask("import detectron2.engine as e; e.DefaultTrainer")
ask("import detectron2; detectron2.nothing")
for module in pkgutil.walk_packages(detectron2.__path__, "detectron2."):
    found = importlib.import_module(module.name)
    if module.ispkg:
        ask(f"from {module.name} import no_such_name")
        assert not hasattr(found, "no_such_name")

class Attack:
    def __reduce__(self):
        return print, ("code ran",)

from detectron2.checkpoint.detection_checkpoint import _ArrayUnpickler
try:
    _ArrayUnpickler(io.BytesIO(pickle.dumps(Attack()))).load()
except pickle.UnpicklingError as error:
    print("UnpicklingError", "|", error)
"""


def test_absent_names_say_so_and_pickles_run_no_code() -> None:
    lines = _python(ABSENT).splitlines()
    assert lines[0] == "0.6 True"
    *absent, attack = lines[1:]
    advice = "is not in detectron2_lite; install the real Detectron2"
    expected = [
        ("ImportError", "detectron2.config.get_cfg"),
        ("ImportError", "detectron2.engine.defaults.DefaultPredictor"),
        ("ImportError", "detectron2.modeling.GeneralizedRCNN"),
        ("ModuleNotFoundError", "detectron2.export"),
        ("ImportError", "detectron2.model_zoo"),
        ("ModuleNotFoundError", "detectron2.model_zoo"),
        ("AttributeError", "detectron2.engine.DefaultTrainer"),
        ("AttributeError", "detectron2.nothing"),
    ]
    for line, (kind, name) in zip(absent, expected, strict=False):
        assert line.startswith(f"{kind} | {name} {advice}")
    packages = absent[len(expected) :]
    assert len(packages) > 10
    for line in packages:
        assert line.startswith("ImportError | detectron2.")
        assert f"no_such_name {advice}" in line
    assert attack.startswith("UnpicklingError | ")
    assert "print" in attack
    assert "code ran" not in lines
