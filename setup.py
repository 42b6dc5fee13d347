"""Build script. What is static stands in pyproject.toml; only what is computed belongs here."""

import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import __version__ as setuptools_version
from setuptools import setup

# pip runs this file without putting its folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_kernels import BuildKernels, outer_extensions


def check_build_tools() -> None:
    """Says what is missing, where setuptools would only speak of an invalid command."""
    release = tuple(int(part) for part in setuptools_version.split(".")[:2])
    if release < (70, 1) and find_spec("wheel") is None:
        sys.exit(
            f"setuptools {setuptools_version} cannot build without the package wheel; "
            "run this first: pip install --upgrade setuptools wheel"
        )


check_build_tools()
setup(
    ext_modules=outer_extensions(),
    cmdclass={"build_ext": BuildKernels},
    # The shared objects call torch, never Python: one wheel serves all versions of Python.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
