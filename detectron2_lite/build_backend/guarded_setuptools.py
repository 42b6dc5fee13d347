"""setuptools' build backend, which refuses to replace a real Detectron2 by the lite one.

Both distributions are called "detectron2", so pip would uninstall the real one without a word. The
packages of the interpreter that asks for the build are looked at, also under build isolation, which
keeps them from being imported but not from being seen.
"""

import functools
import site
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 (hooks that need no guard)
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)


def package_directories() -> list[str]:
    """Where the target interpreter keeps installed distributions."""
    own_source = Path(__file__).resolve().parents[1]
    imported_from = [path for path in sys.path if Path(path).resolve() != own_source]
    paths = sysconfig.get_paths()
    candidates = [paths["purelib"], paths["platlib"], *site.getsitepackages(), *imported_from]
    if site.ENABLE_USER_SITE:
        candidates.append(site.getusersitepackages())
    return list(dict.fromkeys(path for path in candidates if Path(path).is_dir()))


def refuse_to_replace_real_detectron2() -> None:
    """Exits with a sentence if the target interpreter has a Detectron2 other than the lite one."""
    directories = package_directories()
    found = {
        f"{distribution.version} in {distribution.locate_file('')}"
        for distribution in distributions(name="detectron2", path=directories)
        if "lite" not in distribution.version
    }
    links = [Path(path) / "detectron2.egg-link" for path in directories]  # of "setup.py develop"
    found.update(f"linked by {link}" for link in links if link.is_file())
    if found:
        sys.exit(
            f"detectron2_lite is not installed, because it would replace the real Detectron2 "
            f"({', '.join(sorted(found))}), which has all that it has: nothing needs to be done."
        )


def _guarded(hook: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(hook)
    def build(*args: Any, **kwargs: Any) -> str:
        refuse_to_replace_real_detectron2()
        return hook(*args, **kwargs)

    return build


build_wheel = _guarded(build_meta.build_wheel)
build_editable = _guarded(build_meta.build_editable)
prepare_metadata_for_build_wheel = _guarded(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _guarded(build_meta.prepare_metadata_for_build_editable)
