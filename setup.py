"""Build script. What is static stands in pyproject.toml; only what is computed belongs here."""

import sys
from importlib.util import find_spec

from setuptools import __version__ as setuptools_version
from setuptools import setup


def check_build_tools() -> None:
    """Says what is missing, where setuptools would only speak of an invalid command."""
    release = tuple(int(part) for part in setuptools_version.split(".")[:2])
    if release < (70, 1) and find_spec("wheel") is None:
        sys.exit(
            f"setuptools {setuptools_version} cannot build without the package wheel; "
            "run this first: pip install --upgrade setuptools wheel"
        )


check_build_tools()
setup()
