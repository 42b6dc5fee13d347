"""The build of the compiled kernels: what it decides, what it leaves behind, what it says."""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution

import setup_kernels
from setup_kernels import BuildKernels, Built, NotBuilt, Torch

ROOT = Path(__file__).parent.parent
CPU_TORCH = Torch("2.13.0+cpu")
CUDA_TORCH = Torch("2.13.0+cu130", "13.0", None, ("7.5", "8.0", "9.0", "12.0"))


# Switches and environment variables


@pytest.mark.parametrize(
    ("kernels", "cuda", "expected"),
    [
        (None, None, {"cpu": "auto", "cuda": "auto"}),
        ("", "", {"cpu": "auto", "cuda": "auto"}),
        ("1", None, {"cpu": "1", "cuda": "auto"}),
        ("0", None, {"cpu": "0", "cuda": "0"}),
        (None, "0", {"cpu": "auto", "cuda": "0"}),
        ("auto", "1", {"cpu": "auto", "cuda": "1"}),
    ],
)
def test_switches(kernels: str | None, cuda: str | None, expected: dict[str, str]) -> None:
    given = {"EFFICIENT_DETR_BUILD_KERNELS": kernels, "EFFICIENT_DETR_BUILD_CUDA": cuda}
    environ = {name: value for name, value in given.items() if value is not None}
    assert setup_kernels.read_switches(environ) == expected


def test_switches_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SystemExit, match="EFFICIENT_DETR_BUILD_CUDA is 'yes'; it can be auto, 0"):
        setup_kernels.read_switches({"EFFICIENT_DETR_BUILD_CUDA": "yes"})
    with pytest.raises(SystemExit, match="unset one of the two"):
        setup_kernels.read_switches(
            {"EFFICIENT_DETR_BUILD_KERNELS": "0", "EFFICIENT_DETR_BUILD_CUDA": "1"}
        )


MISTAKES = [
    ({"EFFICIENT_DETR_BUILD_KERNELS": "yes"}, "is 'yes'; it can be auto, 0 or 1"),
    (
        {"EFFICIENT_DETR_BUILD_KERNELS": "0", "EFFICIENT_DETR_BUILD_CUDA": "1"},
        "unset one of the two",
    ),
    ({"CXX": "g++ '"}, r"error: CXX is \"g\+\+ '\", which cannot be read: no closing quotation\."),
    ({"LDFLAGS": "-L\\"}, r"LDFLAGS is .*, which cannot be read: no escaped character\."),
]


@pytest.mark.parametrize(("environ", "sentence"), MISTAKES)
def test_a_mistake_of_the_caller_costs_no_earlier_build(
    package: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], sentence: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    earlier = files_of(package)
    with pytest.raises(SystemExit, match=sentence):
        run_command()
    assert files_of(package) == earlier


def test_flags_that_change_results_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"CXXFLAGS": "-g -march=native -DNAME='a b' -ffast-math -march=armv8-a"}
    kept = setup_kernels.allowed_flags(environ, "CXXFLAGS")
    assert kept == ["-g", "-DNAME=a b", "-march=armv8-a"]
    said = capsys.readouterr().err
    assert "CXXFLAGS holds -march=native" in said
    assert "CXXFLAGS holds -ffast-math" in said


def test_our_own_flags_change_no_results() -> None:
    flags = [*setup_kernels.CXX_FLAGS, *setup_kernels.NVCC_FLAGS]
    assert not [flag for flag in flags if setup_kernels.HARMFUL.search(flag)]


@pytest.mark.parametrize("given", ["0", "many", ""])
def test_number_of_compilers(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    assert setup_kernels.job_limit({"MAX_JOBS": "3"}) == 3
    memory = {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 2**12}  # 4 GiB
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert setup_kernels.job_limit({"MAX_JOBS": given}) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5})
    assert setup_kernels.job_limit({}) == 1


# Compilers and toolkits


def find_only(monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)


def test_the_compiler_that_cxx_names(monkeypatch: pytest.MonkeyPatch) -> None:
    find_only(monkeypatch, "c++", "clang++-18", "ccache")
    assert setup_kernels.find_compiler({}) == ("c++", [])
    assert setup_kernels.find_compiler({"CXX": "clang++-18 -m64"}) == ("clang++-18", ["-m64"])
    assert setup_kernels.find_compiler({"CXX": "ccache clang++-18"}) == ("clang++-18", [])
    with pytest.raises(NotBuilt, match="CXX names g\\+\\+-9, which cannot be found"):
        setup_kernels.find_compiler({"CXX": "g++-9"})


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    find_only(monkeypatch)
    with pytest.raises(NotBuilt, match="no C\\+\\+ compiler was found"):
        setup_kernels.find_compiler({})


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "exit status 3, it said nothing"),
        ("exit 0", "exit status 0, it said nothing"),  # --version succeeds with many a program
        ("cat; echo 'error: no licence' >&2; exit 1", "exit status 1, error: no licence"),
        (None, "Permission denied"),
    ],
)
def test_a_compiler_that_does_not_work(tmp_path: Path, script: str | None, reason: str) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755 if script else 0o644)
    with pytest.raises(NotBuilt) as outcome:
        setup_kernels.check_compiler(str(compiler), [])
    assert str(outcome.value) == f"the C++ compiler {compiler} does not work: {reason}"
    assert outcome.value.state == "not possible"


def make_toolkit(home: Path, release: str) -> None:
    for file in ("bin/nvcc", "include/cuda_runtime.h"):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    script = f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.88"\n'
    (home / "bin/nvcc").write_text(script)
    (home / "bin/nvcc").chmod(0o755)


def test_a_toolkit_of_the_same_major_version_will_do(tmp_path: Path) -> None:
    make_toolkit(tmp_path, "13.2")
    assert setup_kernels.find_cuda({"CUDA_HOME": str(tmp_path)}, "13.0") == (tmp_path, "13.2")


def test_a_toolkit_of_another_major_version_will_not(tmp_path: Path) -> None:
    make_toolkit(tmp_path, "12.8")
    with pytest.raises(NotBuilt, match=r"is 12\.8, but torch uses CUDA 13\.0; install a toolkit"):
        setup_kernels.find_cuda({"CUDA_HOME": str(tmp_path)}, "13.0")


def test_a_wrapper_of_nvcc_is_not_taken_for_a_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper, toolkit = tmp_path / "usr", tmp_path / "cuda"
    make_toolkit(wrapper, "13.0")
    (wrapper / "include/cuda_runtime.h").unlink()
    make_toolkit(toolkit, "13.0")
    monkeypatch.setattr(shutil, "which", lambda name: str(wrapper / "bin" / name))
    environ = {"CUDA_HOME": str(wrapper), "CUDA_PATH": str(toolkit)}
    assert setup_kernels.find_cuda(environ, "13.0")[0] == toolkit


def test_a_torch_without_cuda_gets_no_cuda_kernels(tmp_path: Path) -> None:
    with pytest.raises(NotBuilt, match=r"torch 2\.13\.0\+cpu is built without CUDA") as outcome:
        setup_kernels.build_cuda(tmp_path, CPU_TORCH, {})
    assert outcome.value.state == "not needed"
    with pytest.raises(NotBuilt, match="is for ROCm"):
        setup_kernels.build_cuda(tmp_path, Torch("2.13.0+rocm7", hip="7.0"), {})


# GPU architectures

NVCC_13 = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


@pytest.mark.parametrize(
    ("asked", "visible", "expected"),
    [
        ("", (), ["7.5", "8.0", "9.0", "12.0+PTX"]),  # what torch and nvcc both know
        ("", ("8.6",), ["8.6+PTX"]),  # the GPU at hand
        ("", ("7.0",), [*NVCC_13[:-1], "12.0+PTX"]),  # which this nvcc has forgotten
        ("native", ("8.0", "9.0"), ["8.0", "9.0+PTX"]),
        ("9.0", ("8.6",), ["9.0"]),
        ("8.0;9.0a, 12.0+PTX ", (), ["8.0", "9.0a", "12.0+PTX"]),
    ],
)
def test_architectures(asked: str, visible: tuple[str, ...], expected: list[str]) -> None:
    torch = Torch(CUDA_TORCH.version, "13.0", None, CUDA_TORCH.architectures, visible)
    assert setup_kernels.choose_architectures(asked, torch, NVCC_13) == expected


def test_an_architecture_that_is_none() -> None:
    with pytest.raises(NotBuilt, match="TORCH_CUDA_ARCH_LIST holds 'Hopper'; write capabilities"):
        setup_kernels.choose_architectures("8.0 Hopper", CUDA_TORCH, NVCC_13)


def test_gpus_too_old_for_the_kernels() -> None:
    torch = Torch(CUDA_TORCH.version, "12.6", None, ("5.0", "6.0", "7.0", "8.0"))
    nvcc = ["5.0", "6.0", "7.0", "7.5", "8.0"]
    assert setup_kernels.choose_architectures("", torch, nvcc) == ["7.0", "8.0+PTX"]
    with pytest.raises(NotBuilt, match=r"'6\.0\+PTX'; the kernels need GPUs of capability 7\.0"):
        setup_kernels.choose_architectures("8.0 6.0+PTX", torch, nvcc)
    at_hand = Torch(CUDA_TORCH.version, "12.6", None, torch.architectures, ("6.1",))
    with pytest.raises(NotBuilt, match="the GPUs at hand are older"):
        setup_kernels.choose_architectures("", at_hand, nvcc)
    with pytest.raises(NotBuilt, match="nvcc names no GPU"):
        setup_kernels.choose_architectures("", torch, nvcc[:2])


def test_capabilities_from_the_names_of_torch_and_nvcc() -> None:
    names = "sm_75 sm_90 sm_90a compute_120\ncompute_80"
    assert setup_kernels.capabilities(names) == ["7.5", "8.0", "9.0", "12.0"]


def test_architecture_flags() -> None:
    assert setup_kernels.architecture_flags(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


# What compilers say


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("[1/2] g++ x\ncpu.cpp:3:1: error: no y\nninja: stopped", "cpu.cpp:3:1: error: no y"),
        (
            "ld: cpu.o: in function f: undefined reference to `g'\ncollect2: error: ld returned 1",
            "ld: cpu.o: in function f: undefined reference to `g'",
        ),
        (
            "nvcc fatal   : Unsupported gpu architecture",
            "nvcc fatal   : Unsupported gpu architecture",
        ),
        ("Traceback\n  File x\nRuntimeError: g++ is too new\n", "RuntimeError: g++ is too new"),
        ("Killed\n\n", "Killed"),
        ("", "it said nothing"),
    ],
)
def test_the_line_that_says_most(output: str, expected: str) -> None:
    assert setup_kernels.first_error(output) == expected


# The sources


def test_every_source_and_header_of_the_repository_is_known() -> None:
    cpu, cuda = setup_kernels.outer_extensions()
    assert {Path(source).name for source in cpu.sources} <= {"cpu.cpp", "torch_cpu.cpp"}
    assert {Path(source).name for source in cuda.sources} <= {"cuda.cu", "torch_cuda.cpp"}
    suffixes = {".cpp", ".cu", ".h", ".cuh"}
    on_disk = {path for path in (ROOT / "kernels").rglob("*") if path.suffix in suffixes}
    known = {ROOT / name for name in (*cpu.sources, *cuda.sources, *cpu.depends)}
    assert on_disk == known
    assert not [name for name in (*cpu.sources, *cpu.depends) if Path(name).is_absolute()]


# The whole


def fake_builders(monkeypatch: pytest.MonkeyPatch, **outcomes: Any) -> None:
    """Replaces the two builders: a path is a success, a `NotBuilt` a failure."""

    def builder(device: str) -> Any:
        def build(root: Path, torch: Torch, environ: object) -> Built:
            outcome = outcomes[device]
            if isinstance(outcome, NotBuilt):
                raise outcome
            return Built(outcome, {"compiler": "g++ 12", "architectures": ["8.0", "9.0"]})

        return build

    monkeypatch.setattr(setup_kernels, "build_cpu", builder("cpu"))
    monkeypatch.setattr(setup_kernels, "build_cuda", builder("cuda"))
    monkeypatch.setattr(setup_kernels, "find_torch", lambda: CPU_TORCH)


@pytest.fixture
def product(tmp_path: Path) -> Path:
    path = tmp_path / "fresh.so"
    path.write_text("fresh")
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package in which an earlier build has left its products."""
    folder = tmp_path / "projects" / "efficient_detr" / "ops"
    folder.mkdir(parents=True)
    for name in ("_kernels_cpu.abi3.so", "_kernels_cuda.abi3.so", "_kernels_build.json"):
        (folder / name).write_text("stale")
    (folder / "library.py").touch()
    monkeypatch.chdir(tmp_path)
    for name in setup_kernels.SWITCHES.values():
        monkeypatch.delenv(name, raising=False)
    return folder


def run_command(*, in_place: bool = True) -> BuildKernels:
    attributes = {
        "name": "efficient_detr",
        "package_dir": {"": "projects"},
        "packages": ["efficient_detr", "efficient_detr.ops"],
        "ext_modules": setup_kernels.outer_extensions(),
    }
    command = BuildKernels(Distribution(attributes))
    command.inplace = in_place
    command.ensure_finalized()
    command.run()
    return command


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("_kernels*")}


NO_CUDA = NotBuilt("not needed", "torch 2.13.0+cpu is built without CUDA")


def test_an_editable_installation(
    package: Path,
    product: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_builders(monkeypatch, cpu=product, cuda=NO_CUDA)
    command = run_command()
    files = files_of(package)
    assert files.pop("_kernels_cpu.abi3.so") == "fresh"
    record = json.loads(files.pop("_kernels_build.json"))
    assert not files, "an earlier build has survived"
    assert record["torch"] == "2.13.0+cpu"
    assert record["cpu"]["state"] == "built"
    assert record["cpu"]["file"] == "_kernels_cpu.abi3.so"
    assert record["cpu"]["sha256"] == hashlib.sha256(b"fresh").hexdigest()
    assert record["cuda"] == {"state": "not needed", "reason": str(NO_CUDA)}
    said = capsys.readouterr().err
    assert "CPU kernels built with g++ 12." in said
    assert "the CUDA kernels were not built: torch 2.13.0+cpu is built without CUDA.\n" in said
    mapping = command.get_output_mapping()
    assert sorted(Path(place).name for place in mapping.values()) == [
        "_kernels_build.json",
        "_kernels_cpu.abi3.so",
    ]


def test_a_wheel(
    package: Path,
    product: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_builders(monkeypatch, cpu=product, cuda=product)
    command = run_command(in_place=False)
    assert set(files_of(package).values()) == {"stale"}, "the source folder is none of its business"
    outputs = [Path(name) for name in command.get_outputs()]
    assert {path.name for path in outputs} == set(files_of(package))
    assert all(path.exists() for path in outputs)
    assert command.get_output_mapping() == {}
    assert "CUDA kernels built with g++ 12 and nvcc for 8.0 9.0." in capsys.readouterr().err


def test_a_failure_leaves_no_stale_kernels_and_a_reason(
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "cpu.log"
    log.write_text("cpu.cpp:1:1: error: no\n")
    failure = NotBuilt("failed", "compiling them failed (cpu.cpp:1:1: error: no)", log)
    fake_builders(monkeypatch, cpu=failure, cuda=NO_CUDA)
    run_command()
    files = files_of(package)
    assert set(files) == {"_kernels_build.json"}
    assert json.loads(files["_kernels_build.json"])["cpu"] == {
        "state": "failed",
        "reason": str(failure),
        "log": str(log),
        "output": ["cpu.cpp:1:1: error: no"],
    }
    said = capsys.readouterr().err
    assert f"{failure}; the compiler's output is in {log}. Plain PyTorch takes their" in said
    assert "EFFICIENT_DETR_BUILD_KERNELS=1 makes this an error." in said


def test_a_failure_of_cuda_does_not_cost_the_cpu_kernels(
    package: Path, product: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_builders(monkeypatch, cpu=product, cuda=NotBuilt("failed", "nvcc crashed"))
    run_command()
    assert set(files_of(package)) == {"_kernels_cpu.abi3.so", "_kernels_build.json"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_demand_that_cannot_be_met_fails_the_installation(
    package: Path, product: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setenv(setup_kernels.SWITCHES[device], "1")
    outcomes: dict[str, Any] = {"cpu": product, "cuda": NO_CUDA}
    outcomes[device] = NotBuilt("not possible", "no compiler")
    fake_builders(monkeypatch, **outcomes)
    label = setup_kernels.LABELS[device]
    with pytest.raises(SystemExit, match=f"the {label} kernels were not built: no compiler. E"):
        run_command()
    # Whoever uses the folder all the same is told the reason.
    record = json.loads((package / "_kernels_build.json").read_text())
    assert record[device]["reason"] == "no compiler"


def test_switched_off(
    package: Path,
    product: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EFFICIENT_DETR_BUILD_KERNELS", "0")
    fake_builders(monkeypatch, cpu=product, cuda=product)
    run_command()
    assert set(files_of(package)) == {"_kernels_build.json"}
    assert capsys.readouterr().err.splitlines() == [
        "efficient_detr: the CPU kernels were not built: EFFICIENT_DETR_BUILD_KERNELS was 0."
    ]


def test_an_interrupted_build_leaves_nothing(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(root: Path, torch: Torch, environ: object) -> Built:
        raise KeyboardInterrupt

    fake_builders(monkeypatch, cpu=NO_CUDA, cuda=NO_CUDA)
    monkeypatch.setattr(setup_kernels, "build_cpu", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_command()
    assert files_of(package) == {}


def test_a_build_without_torch(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What an import finds where pip builds in an environment of its own.
    monkeypatch.setitem(sys.modules, "torch", None)
    run_command()
    record = json.loads((package / "_kernels_build.json").read_text())
    assert record["torch"] is None
    assert "no torch is visible to the build" in record["cpu"]["reason"]
    said = capsys.readouterr().err
    assert said.count("--no-build-isolation") == 1


# For real

REAL = {
    "kernels/counting/counting.h": "inline int count() { return 3; }\n",
    "kernels/counting/cpu.cpp": '#include "counting/counting.h"\n'
    'extern "C" __attribute__((visibility("default"))) int counted() { return count(); }\n',
}


@pytest.mark.parametrize("locale", [{"LC_ALL": "C.UTF-8"}, {"LANG": "C.UTF-8"}, {}])
def test_the_compiling_process_reads_the_paths_that_this_one_reads(
    tmp_path: Path, locale: dict[str, str]
) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    text = f"{tmp_path / 'sp äö ü'}\n"
    (packages / "__editable__.efficient_detr.pth").write_text(text, encoding="utf-8")

    def starts(environ: dict[str, str]) -> bool:
        command = [str(environment / "bin" / "python"), "-c", ""]
        return subprocess.run(command, env=environ, capture_output=True).returncode == 0

    names = {name for name in os.environ if name.startswith("LC_")} | {"LANG", "LANGUAGE"}
    environ = {name: value for name, value in os.environ.items() if name not in names} | locale
    if not starts(environ):
        pytest.skip("there is no such locale")
    assert starts(setup_kernels.job_environ(environ))


def test_compilers_speak_english() -> None:
    changed = setup_kernels.job_environ({"LC_ALL": "de_DE.UTF-8", "LANG": "fr_FR.UTF-8"})
    assert "LC_ALL" not in changed, "which would overrule LC_MESSAGES"
    assert changed["LC_MESSAGES"] == "C"
    assert changed["LC_CTYPE"] == "de_DE.UTF-8"
    assert "LC_CTYPE" not in setup_kernels.job_environ({})


def test_a_header_is_compiled_again_when_it_changes_and_its_mistakes_are_reported(
    tmp_path: Path,
) -> None:
    root = tmp_path / "sp äö ü"
    for name, text in REAL.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    try:
        setup_kernels.find_compiler(os.environ)
    except NotBuilt as reason:
        pytest.skip(str(reason))
    built = setup_kernels.build_cpu(root, CPU_TORCH, os.environ)
    assert ctypes.CDLL(str(built.path)).counted() == 3
    assert "-O3" in built.entry["flags"]

    header = root / "kernels/counting/counting.h"
    header.write_text("inline int count() { return four; }\n")
    with pytest.raises(NotBuilt, match=r"\(kernels/counting/counting.h:1:\d+: error: ") as outcome:
        setup_kernels.build_cpu(root, CPU_TORCH, os.environ)
    assert outcome.value.log is not None
    assert "four" in outcome.value.log.read_text()
    assert not built.path.exists()
