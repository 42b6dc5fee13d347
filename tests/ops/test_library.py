"""Which implementation an operator uses, and what is said about it."""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import efficient_detr
from efficient_detr.ops import library
from efficient_detr.ops.library import KernelLoader

NAMESPACE = "efficient_detr_test_library"
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
PACKAGE = Path(efficient_detr.__file__).parent


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.ENVIRONMENT_VARIABLE, raising=False)


def write_record(folder: Path, **record: Any) -> None:
    (folder / "_kernels_build.json").write_text(json.dumps(record))


def loader_in(folder: Path) -> KernelLoader:
    """A loader for operators of which there are none, unless the test defines some."""
    return KernelLoader(folder, NAMESPACE)


def find_loadable() -> Path:
    """A shared object that is sure to load, since torch has loaded it already."""
    return next((Path(torch.__file__).parent / "lib").glob("libc10.*"))


def place_loadable(folder: Path, device: str = "cpu") -> None:
    (folder / f"_kernels_{device}.abi3.so").symlink_to(find_loadable())


def place_broken(folder: Path, device: str = "cpu") -> None:
    (folder / f"_kernels_{device}.abi3.so").write_bytes(b"not a shared object")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")


def test_kernels_that_load_are_chosen(tmp_path: Path) -> None:
    place_loadable(tmp_path)
    assert loader_in(tmp_path).choose(CPU, None) == "compiled"


def test_the_argument_beats_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_loadable(tmp_path)
    loader = loader_in(tmp_path)
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "pytorch")
    assert loader.choose(CPU, None) == "pytorch"
    assert loader.choose(CPU, "compiled") == "compiled"
    assert loader.choose(CPU, "auto") == "compiled"
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "")
    assert loader.choose(CPU, None) == "compiled"


def test_a_wish_that_does_not_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="the argument implementation is 'fast'; it can be auto"):
        loader_in(tmp_path).choose(CPU, "fast")
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="EFFICIENT_DETR_OPS is 'cuda'; it can be auto"):
        loader_in(tmp_path).choose(CPU, None)


def test_forcing_absent_kernels_says_why_and_what_to_do(tmp_path: Path) -> None:
    write_record(tmp_path, cpu={"state": "not possible", "reason": "no C++ compiler was found"})
    with pytest.raises(RuntimeError) as failure:
        loader_in(tmp_path).choose(CPU, "compiled")
    text = str(failure.value)
    assert "on cpu, but the CPU kernels are not built: no C++ compiler was found" in text
    assert "EFFICIENT_DETR_BUILD_KERNELS=1 pip install" in text
    assert "\n" not in text


ABSENT = {
    "no record": (None, "not installed by pip"),
    "switched off": (
        {"state": "switched off", "reason": "EFFICIENT_DETR_BUILD_KERNELS was 0"},
        r"were switched off when efficient_detr was installed \(EFFICIENT_DETR_BUILD_KERNELS was 0",
    ),
    "failed": (
        {"state": "failed", "reason": "compiling them failed (cpu.cpp:1:1: error: no)"},
        r"are not built: compiling them failed \(cpu.cpp:1:1: error: no\)",
    ),
    "another kind of torch": (
        {"state": "not needed", "reason": "torch 2.13.0+cpu is built without CUDA"},
        r"not built: the build was for another torch \(torch 2.13.0\+cpu is built without CUDA\)",
    ),
    "deleted": ({"state": "built", "compiler": "g++"}, "were built, but the file is gone"),
}


@pytest.mark.parametrize("case", ABSENT)
def test_each_reason_for_absence_is_a_sentence_of_its_own(tmp_path: Path, case: str) -> None:
    entry, expected = ABSENT[case]
    if entry is not None:
        write_record(tmp_path, torch=torch.__version__, cpu=entry)
    with pytest.raises(RuntimeError, match=expected):
        loader_in(tmp_path).choose(CPU, "compiled")
    assert loader_in(tmp_path).choose(CPU, None) == "pytorch"


NO_RECORDS = [
    "",
    "{",
    "[]",
    "[" * 100_000,
    '{"cpu": null}',
    '{"cpu": "built", "cuda": 3}',
    '{"cpu": {"flags": [1]}}',
    '{"cpu": {"state": ["built"]}}',
    '{"cuda": {"architectures": "9.0"}}',
    '{"cpu": {"state": "built"}, "torch": 5}',
]


@pytest.mark.parametrize("content", NO_RECORDS)
def test_an_unreadable_record_is_no_obstacle(tmp_path: Path, content: str) -> None:
    (tmp_path / "_kernels_build.json").write_text(content)
    assert loader_in(tmp_path).build_record() == {}
    assert loader_in(tmp_path).choose(CPU, None) == "pytorch"
    place_loadable(tmp_path)
    assert loader_in(tmp_path).choose(CPU, None) == "compiled"


def test_built_for_another_torch(tmp_path: Path) -> None:
    place_broken(tmp_path)
    write_record(tmp_path, torch="9.9.9", cpu={"state": "built"})
    loader = loader_in(tmp_path)
    assert loader.choose(CPU, None) == "pytorch"
    problem = loader.problem(CPU)
    assert "built for another torch: for 9.9.9, while this is " + torch.__version__ in problem
    assert "not built" not in problem


def test_broken_with_the_same_torch(tmp_path: Path) -> None:
    place_broken(tmp_path)
    write_record(tmp_path, torch=torch.__version__, cpu={"state": "built"})
    problem = loader_in(tmp_path).problem(CPU)
    assert re.fullmatch(r"the CPU kernels are built, but cannot be loaded \(.+\)", problem)
    assert str(tmp_path) not in problem


@pytest.mark.parametrize(("kept", "loads"), [(None, True), (-1, False), (0, False)])
def test_only_the_file_that_was_built_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int | None, loads: bool
) -> None:
    content = b"stands for a shared object"
    digest = hashlib.sha256(content).hexdigest()
    write_record(tmp_path, cpu={"state": "built", "sha256": digest})
    (tmp_path / "_kernels_cpu.abi3.so").write_bytes(content[:kept])
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    problem = loader_in(tmp_path).problem(CPU)
    assert bool(loaded) is loads
    assert problem.startswith("" if loads else "the CPU kernels are built, but the file is damaged")


def test_kernels_of_older_sources_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place_loadable(tmp_path)
    with torch.library._scoped_library(NAMESPACE, "FRAGMENT") as operators:
        operators.define("old(Tensor x) -> Tensor")
        operators.define("new(Tensor x) -> Tensor")
        operators.impl("old", torch.neg, "CPU")
        stale = loader_in(tmp_path)
        assert [stale.choose(CPU, None) for _ in range(2)] == ["pytorch"] * 2
        assert caplog.text.count("are built from older sources, without new; to build") == 1
        with pytest.raises(RuntimeError, match="older sources, without new; to build them, run"):
            stale.choose(CPU, "compiled")
        operators.impl("new", torch.neg, "CPU")
        assert loader_in(tmp_path).choose(CPU, None) == "compiled"


def test_torch_may_be_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_loadable(tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    problem = loader_in(tmp_path).problem(CPU)
    assert problem == "the compiled kernels need torch 2.11 or newer, and this is 2.10.1+cpu"


def test_a_torch_without_cuda_is_not_asked_to_load_cuda_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    place_loadable(tmp_path, "cuda")
    assert "is built without CUDA" in loader_in(tmp_path).problem(CUDA)


def test_cuda_kernels_for_another_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    place_loadable(tmp_path, "cuda")
    write_record(tmp_path, torch_cuda="12.8", cuda={"state": "built", "architectures": ["9.0"]})
    problem = loader_in(tmp_path).problem(CUDA)
    assert problem.startswith("the CUDA kernels are built for another torch: for CUDA 12.8, while")
    write_record(tmp_path, torch_cuda="13.1", cuda={"state": "built", "architectures": ["9.0"]})
    assert loader_in(tmp_path).problem(CUDA) == ""


def test_cuda_kernels_for_other_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5))
    place_loadable(tmp_path, "cuda")
    write_record(tmp_path, torch_cuda="13.0", cuda={"state": "built", "architectures": ["8.0"]})
    loader = loader_in(tmp_path)
    assert loader.choose(CUDA, None) == "pytorch"
    expected = "the CUDA kernels are built for GPUs of capability 8.0, while Test GPU has 7.5"
    assert loader.problem(CUDA) == expected


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),  # binaries run on later GPUs of the same generation
        ("8.6", (8, 0), False),  # not on earlier ones
        ("8.0", (9, 0), False),  # nor on the next generation
        ("8.0+PTX", (9, 0), True),  # which can compile PTX instead
        ("8.0+PTX", (7, 5), False),
        ("9.0a", (9, 0), True),  # features of this very GPU
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),  # of its family
        ("10.0f+PTX", (12, 0), False),
        ("12.0", (12, 1), True),
        ("Hopper", (9, 0), False),
    ],
)
def test_which_gpus_an_architecture_covers(
    architecture: str, capability: tuple[int, int], runs: bool
) -> None:
    assert library.covers(architecture, capability) is runs


def test_other_devices_have_no_kernels_and_need_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place_loadable(tmp_path)
    assert loader_in(tmp_path).choose(torch.device("meta"), None) == "pytorch"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_missing_faster_implementation_is_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_record(tmp_path, cpu={"state": "not possible", "reason": "no C++ compiler was found"})
    loader = loader_in(tmp_path)
    with caplog.at_level(logging.INFO, logger=library.__name__):
        for device in (CPU, CPU, torch.device("cpu", 0)):
            loader.choose(device, None)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C++ compiler was found; to build them, run" in caplog.text


def test_what_was_chosen_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place_loadable(tmp_path)
    loader = loader_in(tmp_path)
    with caplog.at_level(logging.INFO, logger=library.__name__):
        for _ in range(3):
            loader.choose(CPU, None)
        for _ in range(3):
            loader.choose(CPU, "pytorch")
    assert [record.getMessage() for record in caplog.records] == [
        "Operators on cpu use the compiled kernels.",
        "Operators on cpu use plain PyTorch, as asked for.",
    ]


def test_many_threads_load_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_loadable(tmp_path)
    loaded: list[str] = []

    def slow_load(path: str) -> None:
        time.sleep(0.05)
        loaded.append(path)

    monkeypatch.setattr(torch.ops, "load_library", slow_load)
    loader = loader_in(tmp_path)
    choices: list[str] = []
    threads = [
        threading.Thread(target=lambda: choices.append(loader.choose(CPU, None))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert choices == ["compiled"] * 8
    assert len(loaded) == 1


def test_status_describes_both_libraries() -> None:
    library.load()
    library.load()
    parts = library.status()
    assert [part.device for part in parts] == ["cpu", "cuda"]
    for part in parts:
        assert part.loaded == (part.problem == "")
        assert part.exists == part.path.exists()
        assert part.path.parent == PACKAGE / "ops"


def test_choosing_inside_a_compiled_function_breaks_no_graph() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if library.choose(x.device, "pytorch") == "pytorch" else x

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


RUN_WITHOUT_KERNELS = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
import efficient_detr
from efficient_detr.ops import fused_multi_scale_deformable_attention
from efficient_detr.ops import library, lsh_clustering, multi_scale_deformable_attention
assert efficient_detr.__file__.startswith(sys.argv[1]), efficient_detr.__file__
assert not library._loader._libraries, "importing has loaded something"
# One level of 1 x 2 cells with values 1 and 3, sampled in its centre: (1 + 3) / 2.
output = multi_scale_deformable_attention(
    torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), [(1, 2)],
    torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1),
)
assert output.item() == 2, output
# The same cell by a reference point of (0, 0.5) and an offset of one cell, of two.
fused = fused_multi_scale_deformable_attention(
    torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), [(1, 2)], torch.tensor([0.0, 0.5]).view(1, 1, 1, 2),
    torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1),
)
assert fused.item() == 2, fused
# Tokens 0 and 2 make a cluster of mean (1 + 5) / 2.
clusters = lsh_clustering.group_by_key(torch.tensor([[[7, 5, 7]]]))
points = torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 3, 1)
means = lsh_clustering.cluster_mean(points, clusters.ids, clusters.counts)
assert lsh_clustering.cluster_broadcast(means, clusters.ids).flatten().tolist() == [3, 2, 3]
print(library.choose(torch.device("cpu")), "|", library.missing_reason(torch.device("cpu")))
"""


OUTCOMES = {
    "absent": "pytorch | the CPU kernels are not built",
    "broken": "cannot be loaded",
    # Loading it would end the process.
    "truncated": "the file is damaged",
    "foreign": "older sources, without cluster_broadcast, ",
}


def place_kernels(folder: Path, state: str) -> None:
    if state == "broken":
        place_broken(folder)
    elif state == "truncated":
        whole = find_loadable().read_bytes()
        digest = hashlib.sha256(whole).hexdigest()
        write_record(folder, torch=torch.__version__, cpu={"state": "built", "sha256": digest})
        (folder / "_kernels_cpu.abi3.so").write_bytes(whole[:100_000])
    elif state == "foreign":
        place_loadable(folder)


@pytest.mark.parametrize("state", OUTCOMES)
def test_a_copy_without_working_kernels_runs_every_operator(tmp_path: Path, state: str) -> None:
    ignored = shutil.ignore_patterns("*.so", "_kernels_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "efficient_detr", ignore=ignored)
    place_kernels(tmp_path / "efficient_detr" / "ops", state)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    finished = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT_KERNELS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "WARNING Operators on cpu use plain PyTorch, which is slower" in finished.stdout
    assert OUTCOMES[state] in finished.stdout.splitlines()[-1]
