"""Runs CUDA kernels on the host: compiles a driver of tests/kernels and calls its functions.

A driver is a program of its own, because the address sanitizer wants to be there from the start.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent / "kernels"
# All that points at wrong accesses; the full set of "undefined" doubles the time to compile.
CHECKS = "address,alignment,bounds,float-cast-overflow,integer-divide-by-zero,shift"
SANITIZERS = [f"-fsanitize={CHECKS},signed-integer-overflow", "-fno-sanitize-recover=all"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++20", "-O0", "-g1", "-fno-math-errno", *WARNINGS]
# Fibers leave their stacks in ways that two checks of the sanitizer cannot follow.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


class MisuseError(RuntimeError):
    """The emulation or a sanitizer stopped the kernel; the message is what it said."""


class Driver:
    """A compiled driver, called like a function."""

    def __init__(self, program: Path) -> None:
        self.program = program

    def __call__(self, function: str, inputs: Mapping[str, Tensor | int]) -> dict[str, bytes]:
        """Calls a function of the driver.

        Args:
            function: the name under which the driver knows it.
            inputs: tensors, contiguous copies of which are passed, and integers (int64).

        Returns:
            The bytes of each output.

        Raises:
            MisuseError: if the emulation or a sanitizer found a fault, with their words.
        """
        paths = [self.program.with_suffix(suffix) for suffix in (".in", ".out")]
        with paths[0].open("wb") as file:
            for name, data in inputs.items():
                content = _bytes(torch.tensor(data) if isinstance(data, int) else data)
                file.write(f"{name} {len(content)}\n".encode() + content)
        paths[1].unlink(missing_ok=True)
        done = subprocess.run(
            [str(self.program), function, *map(str, paths)],
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise MisuseError(f"{function} ended with {done.returncode}: {done.stderr[-4000:]}")
        return _records(paths[1].read_bytes())


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _records(content: bytes) -> dict[str, bytes]:
    records = {}
    position = 0
    while position < len(content):
        end = content.index(b"\n", position)
        name, size = content[position:end].decode().split()
        position = end + 1 + int(size)
        records[name] = content[end + 1 : position]
    return records


def tensor_from(content: bytes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor of this shape and dtype that lies in `content`."""
    if not content:
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(*shape)


def compile_driver(
    name: str, folder: Path, *, defines: Sequence[str] = (), flags: Sequence[str] = ()
) -> Driver:
    """Compiles tests/kernels/NAME.cpp into `folder`; skips the test where that is impossible."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulation of the CUDA grid")
    program = folder / name
    command = [
        *compiler.split(),
        *FLAGS,
        *flags,
        *(f"-D{define}" for define in defines),
        f"-I{HERE / 'emulation'}",
        str(HERE / f"{name}.cpp"),
        "-o",
        str(program),
    ]
    if _sanitizers_work(compiler, folder):
        command += SANITIZERS
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
    return Driver(program)


def _sanitizers_work(compiler: str, folder: Path) -> bool:
    source = folder / "sanitizers.cpp"
    source.write_text("int main() { return 0; }\n")
    program = folder / "sanitizers"
    command = [*compiler.split(), *SANITIZERS, str(source), "-o", str(program)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return False
    return subprocess.run([str(program)], capture_output=True, check=False).returncode == 0
