"""Every name of Detectron2 that this repository uses exists in the one that is installed."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["projects", "configs", "tools", "tests", "train_net.py", "demo.py"]
# Configs of Detectron2's own models, which only the real one has.
EXCEPT = ROOT / "configs" / "detectron2"


def _python_files() -> list[Path]:
    files: list[Path] = []
    for name in SOURCES:
        path = ROOT / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [file for file in files if file.is_file() and EXCEPT not in file.parents]


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local names of whatever a file imports from detectron2, and their dotted names."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module.split(".")[0] == "detectron2":
                for alias in node.names:
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.split(".")[0]
                if package == "detectron2":
                    aliases[alias.asname or package] = alias.name if alias.asname else package
    return aliases


def _used_names(file: Path) -> Iterator[tuple[str, int]]:
    """Dotted names, such as detectron2.engine.hooks.EvalHook, and the lines of their use."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    aliases = _aliases(tree)
    for name in aliases.values():
        yield name, 1
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = aliases.get(node.value.id, "")
            if name and name[0].islower() and not node.attr.startswith("__"):
                yield f"{name}.{node.attr}", node.lineno


def _exists(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        # What is left names attributes of a module, then of a class.
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_the_scan_finds_files_and_names() -> None:
    files = _python_files()
    assert Path(__file__) in files
    names = {name for file in files for name, _ in _used_names(file)}
    assert "detectron2.config.LazyCall" in names


def test_the_scan_notices_absent_names(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(
        "from detectron2.engine import hooks as h, NoSuchTrainer\nprint(h.EvalHook, h.NoSuchHook)\n"
    )
    missing = {name for name, _ in _used_names(file) if not _exists(name)}
    assert missing == {"detectron2.engine.NoSuchTrainer", "detectron2.engine.hooks.NoSuchHook"}


def test_every_used_name_exists() -> None:
    uses = {(name, file, line) for file in _python_files() for name, line in _used_names(file)}
    exists = {name: _exists(name) for name in {name for name, _, _ in uses}}
    missing = sorted(
        f"{name} ({file.relative_to(ROOT)}:{line})" for name, file, line in uses if not exists[name]
    )
    if missing:
        pytest.fail("the installed detectron2 lacks:\n" + "\n".join(missing))
