"""Every CUDA file compiles for the newest and the oldest GPUs of a default build, without spills.

Needs nvcc, but neither a GPU nor a torch for CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "kernels"
SOURCES = sorted(KERNELS.rglob("*.cu"))
GLUE = sorted(KERNELS.rglob("torch_cuda.cpp"))
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def _toolkit() -> Path:
    """The folder of the CUDA toolkit; what `nvcc` on the PATH names may be a mere wrapper."""
    found = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if found is not None:
        places.append(str(Path(found).resolve().parents[1]))
    for home in (Path(place) for place in places if place):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    pytest.skip("no CUDA toolkit (nvcc and its headers) is installed")


def _nvcc() -> str:
    return str(_toolkit() / "bin" / "nvcc")


def _oldest_architecture(nvcc: str) -> str:
    """Turing, or the oldest after it that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = sorted(int(number) for number in re.findall(r"compute_(\d+)\b", listed.stdout))
    return f"sm_{next(number for number in known if number >= 75)}"


def _id(path: Path) -> str:
    return str(path.relative_to(KERNELS))


def test_there_is_something_to_compile() -> None:
    assert {path.parent.name for path in SOURCES} == {"deformable_attention", "lsh_clustering"}
    assert {path.parent for path in GLUE} == {path.parent for path in SOURCES}


@pytest.mark.parametrize("oldest", [False, True], ids=["sm_90", "oldest"])
@pytest.mark.parametrize("source", SOURCES, ids=_id)
def test_compiles_without_spills(source: Path, oldest: bool, tmp_path: Path) -> None:
    nvcc = _nvcc()
    architecture = _oldest_architecture(nvcc) if oldest else "sm_90"
    command = [nvcc, "-c", "-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "object.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "warning" not in done.stderr, done.stderr[-6000:]
    spills = _spills(done.stderr)
    assert spills, "nvcc said nothing about registers"
    assert not any(spills.values()), {name: spilt for name, spilt in spills.items() if spilt}


def _spills(output: str) -> dict[str, int]:
    """Bytes that each kernel spills, from what -Xptxas -v prints."""
    kernel = r"Function properties for (\S+)\n\s*\d+ bytes stack frame, "
    found = re.findall(kernel + r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
    return {name: int(stores) + int(loads) for name, stores, loads in found}


def test_spills_are_read_from_what_ptxas_prints() -> None:
    output = (
        "ptxas info    : Function properties for first\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 0 barriers\n"
        "ptxas info    : Function properties for second\n"
        "    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads\n"
    )
    assert _spills(output) == {"first": 0, "second": 32}


@pytest.mark.parametrize("source", GLUE, ids=_id)
def test_glue_fits_the_headers_of_the_installed_torch(source: Path) -> None:
    """Any torch will do: the headers of the stable ABI are the same for CPU and CUDA."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    toolkit = _toolkit() / "include"
    torch_headers = Path(torch.__file__).parent / "include"
    command = [*compiler.split(), "-fsyntax-only", "-std=c++20", "-Wall", "-Wextra", "-DUSE_CUDA"]
    includes = [f"-isystem{torch_headers}", f"-isystem{toolkit}"]
    done = subprocess.run(
        [*command, "-fvisibility=hidden", TARGET, *includes, str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-6000:]
