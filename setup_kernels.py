"""Compiles kernels/ into the shared objects of efficient_detr.ops, on behalf of setup.py.

There are two, `_kernels_cpu` and `_kernels_cuda`, both optional: what cannot be built is reported
in one sentence and recorded beside the package, and plain PyTorch takes its place.

    EFFICIENT_DETR_BUILD_KERNELS   auto (default) | 0: nothing | 1: fail without the CPU kernels
    EFFICIENT_DETR_BUILD_CUDA      auto (default) | 0: CPU only | 1: fail without the CUDA kernels
    TORCH_CUDA_ARCH_LIST           GPU architectures, such as "8.0 9.0+PTX"
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, MAX_JOBS   as everywhere

No GPU is needed to build for one. Nothing Python-specific is compiled, and of torch only its stable
ABI is used: one build serves every Python and every torch from 2.11 on.

Each shared object is compiled by a process of its own, `python setup_kernels.py JOB`, which keeps
what compilers say in a file, and which proves that the result loads before anybody relies on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "efficient_detr.ops"
RECORD = "_kernels_build.json"
OLDEST_TORCH = (2, 11)
# Older GPUs cannot take constant parameters by reference, which the kernels do.
OLDEST_ARCHITECTURE = (7, 0)
HEADERS = (".h", ".cuh")
SOURCES = {"cpu": ("cpu.cpp", "torch_cpu.cpp"), "cuda": ("cuda.cu", "torch_cuda.cpp")}
LABELS = {"cpu": "CPU", "cuda": "CUDA"}
SWITCHES = {"cpu": "EFFICIENT_DETR_BUILD_KERNELS", "cuda": "EFFICIENT_DETR_BUILD_CUDA"}
ISOLATED = "pip install --no-build-isolation"

# Which functions of torch may be called: those that torch 2.11 and everything newer have.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# Neither set nor tested by the kernels, but in the way of vector instructions.
MATHS = ["-fno-math-errno", "-fno-trapping-math"]
COMMON_FLAGS = ["-O3", "-std=c++20", TARGET]
CXX_FLAGS = [*COMMON_FLAGS, *MATHS, "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-g0"]
NVCC_FLAGS = [*COMMON_FLAGS, "-DUSE_CUDA", f"-Xcompiler={','.join(MATHS)},-fvisibility=hidden"]
# They make results depend on the processor or, when linking, flush denormals in the whole process.
HARMFUL = re.compile(r"-march=native|-mcpu=native|-ffast-math|-Ofast|-funsafe-math-optimizations")
FIRST_ERROR = re.compile(
    r"^.*(?:\berror: |undefined (?:reference|symbol)|nvcc fatal|^\w*Error: ).*$", re.MULTILINE
)


class NotBuilt(Exception):  # noqa: N818 - an outcome rather than an error
    """Why a shared object does not come about.

    Attributes:
        state: "switched off" by a switch, "not needed" with this torch, "not possible" on this
            machine, or "failed" half-way.
        log: the file with the compiler's output, if it came to that.
    """

    def __init__(self, state: str, reason: str, log: Path | None = None) -> None:
        super().__init__(reason)
        self.state = state
        self.log = log


@dataclass(frozen=True)
class Torch:
    """The torch to build for.

    Attributes:
        version: such as "2.13.0+cpu".
        cuda: the version of CUDA that it uses, or None.
        hip: the version of ROCm that it uses, or None.
        architectures: of GPUs, that it was built for: "9.0".
        visible: those of the GPUs in this machine.
    """

    version: str
    cuda: str | None = None
    hip: str | None = None
    architectures: tuple[str, ...] = ()
    visible: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One shared object to compile: what the compiling process reads."""

    device: str
    folder: str
    compiler: str
    sources: list[str]
    headers: list[str]
    include: list[str]
    prefix: str
    cxx_flags: list[str]
    nvcc_flags: list[str] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The module's name, as setuptools wants it."""
        return f"{PACKAGE}._kernels_{self.device}"


@dataclass(frozen=True)
class Built:
    """A compiled shared object that has been loaded once, and what the record says about it."""

    path: Path
    entry: dict[str, Any]


def say(text: str) -> None:
    """Prints at once; pip shows it on `pip install -v` and when the installation fails."""
    sys.stderr.write(f"efficient_detr: {text}\n")
    sys.stderr.flush()


# What the caller wants


def read_switches(environ: Mapping[str, str]) -> dict[str, str]:
    """The wish for each device: "auto", "0" or "1"."""
    wishes = {device: environ.get(name) or "auto" for device, name in SWITCHES.items()}
    for device, wish in wishes.items():
        if wish not in ("auto", "0", "1"):
            raise SystemExit(f"error: {SWITCHES[device]} is {wish!r}; it can be auto, 0 or 1.")
    if wishes["cpu"] == "0":
        if wishes["cuda"] == "1":
            raise SystemExit(
                f"error: {SWITCHES['cpu']}=0 forbids all kernels, {SWITCHES['cuda']}=1 demands "
                "those for CUDA; unset one of the two."
            )
        wishes["cuda"] = "0"
    return wishes


def check_environment(environ: Mapping[str, str]) -> None:
    """Looks for mistakes that no compiler is needed to see, while an earlier build still stands.

    Raises:
        SystemExit: if a switch or the quotation marks of a variable make no sense.
    """
    read_switches(environ)
    for name in ("CXX", "CXXFLAGS", "LDFLAGS"):
        words_in(environ, name)


def words_in(environ: Mapping[str, str], name: str) -> list[str]:
    """Splits an environment variable as a shell would."""
    text = environ.get(name, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        reason = f"{error}".lower()
        raise SystemExit(f"error: {name} is {text!r}, which cannot be read: {reason}.") from None


def allowed_flags(environ: Mapping[str, str], name: str) -> list[str]:
    """The flags in an environment variable, less those that would change results."""
    flags = words_in(environ, name)
    for flag in filter(HARMFUL.fullmatch, flags):
        say(f"{name} holds {flag}, which is left out: results must not depend on the machine.")
    return [flag for flag in flags if not HARMFUL.fullmatch(flag)]


def job_limit(environ: Mapping[str, str]) -> int:
    """How many compilers may run at once: MAX_JOBS, else what processors and memory bear."""
    asked = environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    # A container or a batch system may grant fewer processors than the machine has.
    granted = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(granted), memory // 2**31))


# What is there


def find_sources(root: Path, device: str) -> list[str]:
    """The files to compile, relative to the repository."""
    found = (path for name in SOURCES[device] for path in (root / "kernels").glob(f"*/{name}"))
    return sorted(path.relative_to(root).as_posix() for path in found)


def find_headers(root: Path) -> list[str]:
    """All headers of the kernels, relative to the repository; any may enter any source."""
    found = (path for path in (root / "kernels").rglob("*") if path.suffix in HEADERS)
    return sorted(path.relative_to(root).as_posix() for path in found)


def find_torch() -> Torch:
    """Looks at the torch that this Python can import."""
    try:
        import torch
    except ModuleNotFoundError:
        raise NotBuilt(
            "not possible",
            f"no torch is visible to the build; install torch first, then use `{ISOLATED}`",
        ) from None
    except Exception as error:
        raise NotBuilt("not possible", f"torch cannot be imported ({error})") from error
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < OLDEST_TORCH:
        raise NotBuilt("not possible", f"torch {torch.__version__} is older than 2.11")
    cuda: str | None = torch.version.cuda
    if cuda is None:
        return Torch(torch.__version__, hip=torch.version.hip)
    # Unlike torch.cuda.get_arch_list, which knows nothing where there is no GPU.
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)() or ""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)}
    return Torch(
        torch.__version__, cuda, None, tuple(capabilities(flags)), tuple(sorted(visible, key=rank))
    )


def find_compiler(environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """The C++ compiler and the flags that CXX adds to its name."""
    if sys.platform == "win32":
        raise NotBuilt("not possible", "the kernels need GCC or Clang, on Linux or macOS")
    words = words_in(environ, "CXX")
    if words and Path(words[0]).name in ("ccache", "sccache"):
        # torch puts them in front by itself, and takes all of CXX for the name of one program.
        words = words[1:]
    for command in words[:1] or ["c++", "g++", "clang++"]:
        if shutil.which(command):
            return command, words[1:]
    if words:
        raise NotBuilt("not possible", f"CXX names {words[0]}, which cannot be found")
    raise NotBuilt("not possible", "no C++ compiler was found (on Debian: apt install g++)")


def check_compiler(compiler: str, flags: list[str]) -> None:
    """Has the C++ compiler preprocess a word, which is the least that it must be able to do."""
    word = "preprocessed"
    try:
        finished = subprocess.run(
            [compiler, *flags, "-E", "-x", "c++", "-"],
            input=word,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        problem = f"{error.strerror or error}"
    else:
        if finished.returncode == 0 and word in finished.stdout:
            return
        problem = f"exit status {finished.returncode}, {first_error(finished.stderr)}"
    raise NotBuilt("not possible", f"the C++ compiler {compiler} does not work: {problem}")


def find_cuda(environ: Mapping[str, str], torch_cuda: str) -> tuple[Path, str]:
    """The CUDA toolkit that belongs to torch: its folder and version."""
    nvcc = shutil.which("nvcc")
    places = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH")]
    places += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    for home in (Path(place) for place in (*places, "/usr/local/cuda") if place):
        # A mere wrapper of nvcc, somewhere on the PATH, has no headers beside it.
        headers = [home / "include", *home.glob("targets/*/include")]
        if (home / "bin/nvcc").exists() and any((d / "cuda_runtime.h").exists() for d in headers):
            break
    else:
        raise NotBuilt(
            "not possible", f"no CUDA toolkit was found; install nvcc {torch_cuda} or set CUDA_HOME"
        )
    release = re.search(r"release (\d+\.\d+)", output_of([str(home / "bin/nvcc"), "--version"]))
    version = release.group(1) if release else "of unknown version"
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        raise NotBuilt(
            "not possible",
            f"nvcc in {home} is {version}, but torch uses CUDA {torch_cuda}; install a toolkit "
            f"{torch_cuda.split('.')[0]}.x, or a torch for CUDA {version}",
        )
    return home, version


def output_of(command: list[str]) -> str:
    """What a command prints; nothing if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


# GPU architectures


def rank(architecture: str) -> tuple[int, int]:
    """(9, 0) for "9.0", "9.0a" and "9.0+PTX"; for sorting."""
    major, minor = re.findall(r"\d+", architecture)
    return int(major), int(minor)


def capabilities(names: str) -> list[str]:
    """["9.0", "12.0"] for "compute_90 sm_90 sm_90a sm_120"."""
    found = {f"{tens}.{ones}" for tens, ones in re.findall(r"_(\d+)(\d)\b", names)}
    return sorted(found, key=rank)


def choose_architectures(asked: str, torch: Torch, known_to_nvcc: list[str]) -> list[str]:
    """The GPU architectures to compile for.

    Args:
        asked: TORCH_CUDA_ARCH_LIST; "" for those of the visible GPUs or, where there is none, all
            that both torch and nvcc know.
        torch: the torch to build for.
        known_to_nvcc: what nvcc can compile for.

    Returns:
        Such as ["8.0", "9.0+PTX"]; with PTX, newer GPUs can compile the kernels for themselves.
    """
    if asked and asked != "native":
        listed = re.split(r"[\s;,]+", asked.strip(" ;,"))
        for name in listed:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise NotBuilt(
                    "failed",
                    f"TORCH_CUDA_ARCH_LIST holds {name!r}; write capabilities, as in '8.0 9.0+PTX'",
                )
            if not is_supported(name):
                raise NotBuilt(
                    "failed",
                    f"TORCH_CUDA_ARCH_LIST holds {name!r}; the kernels need GPUs of capability 7.0 "
                    "or newer",
                )
        return listed
    known = list(filter(is_supported, known_to_nvcc))
    if not known:
        raise NotBuilt("failed", "nvcc names no GPU of capability 7.0 or newer to compile for")
    if torch.visible and not any(map(is_supported, torch.visible)):
        raise NotBuilt("not possible", "the GPUs at hand are older than capability 7.0")
    wanted = torch.visible or torch.architectures
    both = [name for name in known if name in wanted] or known
    return [*both[:-1], both[-1] + "+PTX"]


def is_supported(architecture: str) -> bool:
    """Whether the kernels can be compiled for "9.0", "9.0a" or "9.0+PTX"."""
    major, minor = re.findall(r"\d+", architecture)[:2]
    return (int(major), int(minor)) >= OLDEST_ARCHITECTURE


def architecture_flags(architectures: Iterable[str]) -> list[str]:
    """The architectures in nvcc's spelling."""
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


# Compiling


def plan_job(root: Path, device: str, torch: Torch, environ: Mapping[str, str]) -> Job:
    """Puts together what is the same for both devices."""
    compiler, flags = find_compiler(environ)
    check_compiler(compiler, flags)
    sources = find_sources(root, device)
    if not sources:
        raise NotBuilt("not possible", f"kernels/*/ holds no {' or '.join(SOURCES[device])}")
    # Objects of another torch or compiler may look up to date to ninja, which compares ages.
    described = (torch.version, torch.cuda, compiler, version_of(compiler), sys.prefix)
    key = hashlib.sha256(repr(described).encode()).hexdigest()[:8]
    return Job(
        device=device,
        folder=str(root / "build" / "kernels" / f"{device}-{key}"),
        compiler=compiler,
        sources=[str(root / source) for source in sources],
        headers=[str(root / header) for header in find_headers(root)],
        include=[str(root / "kernels")],
        # Paths of this machine have no business in messages of a wheel.
        prefix=f"-ffile-prefix-map={root}/=",
        cxx_flags=[*CXX_FLAGS, *flags, *allowed_flags(environ, "CXXFLAGS")],
        link_flags=[*flags, *allowed_flags(environ, "LDFLAGS")],
    )


def version_of(compiler: str) -> str:
    """The first line of what a compiler says about itself."""
    return output_of([compiler, "--version"]).partition("\n")[0]


def build_cpu(root: Path, torch: Torch, environ: Mapping[str, str]) -> Built:
    """Builds the CPU kernels of all operators."""
    job = plan_job(root, "cpu", torch, environ)
    path = run_job(root, job, environ)
    return Built(path, {"compiler": version_of(job.compiler), "flags": job.cxx_flags})


def build_cuda(root: Path, torch: Torch, environ: Mapping[str, str]) -> Built:
    """Builds the CUDA kernels of all operators."""
    if torch.hip is not None:
        raise NotBuilt("not needed", f"torch {torch.version} is for ROCm, not for CUDA")
    if torch.cuda is None:
        raise NotBuilt("not needed", f"torch {torch.version} is built without CUDA")
    job = plan_job(root, "cuda", torch, environ)
    home, version = find_cuda(environ, torch.cuda)
    known = capabilities(output_of([str(home / "bin/nvcc"), "--list-gpu-arch"]))
    architectures = choose_architectures(environ.get("TORCH_CUDA_ARCH_LIST", ""), torch, known)
    job.nvcc_flags.extend([*NVCC_FLAGS, "-ccbin", job.compiler])
    job.nvcc_flags.extend(architecture_flags(architectures))
    job.cxx_flags.append("-DUSE_CUDA")
    path = run_job(root, job, {**environ, "CUDA_HOME": str(home)})
    entry = {"compiler": version_of(job.compiler), "nvcc": version, "flags": job.nvcc_flags}
    return Built(path, {**entry, "architectures": architectures})


def run_job(root: Path, job: Job, environ: Mapping[str, str]) -> Path:
    """Compiles in a process of its own and returns the shared object."""
    folder = Path(job.folder)
    products = folder / "lib"
    shutil.rmtree(products, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(asdict(job), indent=1))
    log = folder.parent / f"{job.device}.log"
    say(f"compiling the {LABELS[job.device]} kernels")
    command = [sys.executable, str(Path(__file__).resolve()), str(folder / "job.json")]
    with log.open("w") as output:
        code = subprocess.run(
            command, cwd=root, stdout=output, stderr=subprocess.STDOUT, env=job_environ(environ)
        ).returncode
    found = list(products.rglob(f"_kernels_{job.device}*"))
    if code != 0 or not found:
        first = first_error(log.read_text(errors="replace")).replace(f"{root}/", "")
        raise NotBuilt("failed", f"compiling them failed ({first})", log)
    return found[0]


def job_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the compiling process."""
    # The scripts of an environment that is not activated: ninja may be there.
    path = [environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    changes = {"PATH": os.pathsep.join(path), "MAX_JOBS": str(job_limit(environ))}
    # Messages in English, for `first_error`, but characters as they are: Python cannot even start
    # in an ASCII locale if the path of an editable installation holds others.
    changes["LC_MESSAGES"] = "C"
    characters = next(filter(None, map(environ.get, ("LC_ALL", "LC_CTYPE", "LANG"))), None)
    if characters:
        changes["LC_CTYPE"] = characters
    return {**{name: value for name, value in environ.items() if name != "LC_ALL"}, **changes}


def first_error(output: str) -> str:
    """The line that says most about a failure."""
    found = FIRST_ERROR.search(output)
    if found:
        return found.group().strip()
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def compile_job(job: Job) -> None:
    """Runs in the compiling process: compiles, links and loads one shared object."""
    import torch
    from torch.utils import cpp_extension

    os.environ["CXX"] = job.compiler
    make = cpp_extension.CUDAExtension if job.device == "cuda" else cpp_extension.CppExtension
    extension = make(
        job.name,
        job.sources,
        depends=job.headers,
        include_dirs=list(job.include),
        extra_compile_args={"cxx": [*job.cxx_flags, job.prefix], "nvcc": job.nvcc_flags},
        extra_link_args=job.link_flags,
        py_limited_api=True,
    )

    class Build(cpp_extension.BuildExtension):
        """Compiles and links with the compiler and flags of the job alone."""

        def build_extensions(self) -> None:
            use_compiler(self.compiler, job.compiler)
            super().build_extensions()

    command = Build(Distribution({"name": "kernels", "ext_modules": [extension]}))
    command.build_lib = str(Path(job.folder) / "lib")
    command.build_temp = str(Path(job.folder) / "objects")
    command.ensure_finalized()
    command.run()
    # A library that lacks a symbol, or was linked with a foreign C++ runtime, shows it here.
    torch.ops.load_library(command.get_ext_fullpath(job.name))


def use_compiler(tools: Any, compiler: str) -> None:
    """Replaces the compiler and the flags that this Python itself was compiled with."""
    compile_command = [compiler, "-fPIC", "-DNDEBUG"]
    commands = {
        **dict.fromkeys(("compiler", "compiler_so", "compiler_so_cxx"), compile_command),
        **dict.fromkeys(("compiler_cxx", "linker_exe", "linker_exe_cxx"), [compiler]),
        **dict.fromkeys(("linker_so", "linker_so_cxx"), [compiler, "-shared"]),
    }
    known = {name: value for name, value in commands.items() if name in tools.executables}
    tools.set_executables(**known)


# What setuptools calls


def outer_extensions(root: Path = ROOT) -> list[Extension]:
    """The extensions as setuptools sees them: which sources belong into a source distribution."""
    headers = find_headers(root)
    return [
        Extension(
            f"{PACKAGE}._kernels_{device}",
            find_sources(root, device),
            depends=headers,
            py_limited_api=True,
        )
        for device in SOURCES
    ]


class BuildKernels(build_ext):
    """Builds what can be built and leaves the record of it."""

    def run(self) -> None:
        """Called by setuptools for wheels and for editable installations alike."""
        check_environment(os.environ)
        in_place = bool(self.inplace or self.editable_mode)
        self.produced: list[str] = []
        folders = [Path(self.build_lib, *PACKAGE.split("."))]
        if in_place:
            package = self.get_finalized_command("build_py").get_package_dir(PACKAGE)
            folders = [Path(package), *folders]
        for folder in folders:
            remove_products(folder)
        built, record = build_all(ROOT, os.environ)
        # Before the report, which may end it all: the record is wanted above all then.
        self.produced = deliver(built, record, folders[0])
        report(record, read_switches(os.environ))

    def get_outputs(self) -> list[str]:
        """What there is to install."""
        return [str(Path(self.build_lib, *PACKAGE.split("."), name)) for name in self._produced()]

    def get_output_mapping(self) -> dict[str, str]:
        """Where an editable installation finds it."""
        if not self.inplace:
            return {}
        package = self.get_finalized_command("build_py").get_package_dir(PACKAGE)
        return dict(
            zip(self.get_outputs(), (str(Path(package, n)) for n in self._produced()), strict=True)
        )

    def _produced(self) -> list[str]:
        return getattr(self, "produced", [])


def build_all(root: Path, environ: Mapping[str, str]) -> tuple[dict[str, Built], dict[str, Any]]:
    """Builds each shared object that is wanted and possible.

    Returns:
        What was built, by device, and the record, in which the devices have an entry each.
    """
    wishes = read_switches(environ)
    built: dict[str, Built] = {}
    entries: dict[str, Any] = {}
    torch: Torch | None = None
    for device, build in (("cpu", build_cpu), ("cuda", build_cuda)):
        try:
            if wishes[device] == "0":
                culprit = "cpu" if wishes["cpu"] == "0" else device
                raise NotBuilt("switched off", f"{SWITCHES[culprit]} was 0")
            torch = torch or find_torch()
            built[device] = build(root, torch, environ)
            entries[device] = {"state": "built", **built[device].entry}
        except NotBuilt as outcome:
            entries[device] = failure_entry(outcome)
    about_torch = asdict(torch) if torch else {}
    keep = {"torch": about_torch.get("version"), "torch_cuda": about_torch.get("cuda")}
    return built, {"format": 1, "machine": platform.machine(), **keep, **entries}


def report(record: Mapping[str, Any], wishes: Mapping[str, str]) -> None:
    """Says in one sentence a device what was built or why not, and what to do.

    Raises:
        SystemExit: if something does not exist that is demanded.
    """
    for device, wish in wishes.items():
        entry = record[device]
        if entry["state"] == "built":
            gpus = f" and nvcc for {' '.join(entry['architectures'])}" if device == "cuda" else ""
            say(f"{LABELS[device]} kernels built with {entry['compiler']}{gpus}.")
            continue
        sentence = f"the {LABELS[device]} kernels were not built: {entry['reason']}"
        if "log" in entry:
            sentence += f"; the compiler's output is in {entry['log']}"
        if wish == "1":
            raise SystemExit(
                f"error: {sentence}. {SWITCHES[device]}=1 demands them; without it, plain PyTorch "
                "takes their place."
            )
        if device == "cuda" and entry["reason"] == record["cpu"].get("reason"):
            continue  # no torch, no compiler: said above
        if entry["state"] in ("not possible", "failed"):
            sentence += (
                ". Plain PyTorch takes their place, which is slower; "
                f"{SWITCHES[device]}=1 makes this an error"
            )
        say(f"{sentence}.")


def failure_entry(outcome: NotBuilt) -> dict[str, Any]:
    """What the record says about a shared object that does not exist."""
    entry: dict[str, Any] = {"state": outcome.state, "reason": str(outcome)}
    if outcome.log is not None:
        entry["log"] = str(outcome.log)
        # pip deletes the folder in which it builds from a download.
        entry["output"] = outcome.log.read_text(errors="replace").splitlines()[-30:]
    return entry


def remove_products(folder: Path) -> None:
    """Deletes an earlier build, so that it cannot be taken for this one if this one fails."""
    for path in (*folder.glob("_kernels_*.so*"), folder / RECORD):
        path.unlink(missing_ok=True)


def deliver(built: dict[str, Built], record: dict[str, Any], folder: Path) -> list[str]:
    """Puts the shared objects and the record into the package; returns the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for device, product in built.items():
        names.append(f"_kernels_{device}.abi3.so")
        record[device]["file"] = names[-1]
        # To load half a file would end the process: the library compares before.
        record[device]["sha256"] = hashlib.sha256(product.path.read_bytes()).hexdigest()
        temporary = folder / f"{names[-1]}.tmp"
        shutil.copyfile(product.path, temporary)
        temporary.replace(folder / names[-1])
    temporary = folder / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(folder / RECORD)
    return [*names, RECORD]


if __name__ == "__main__":
    compile_job(Job(**json.loads(Path(sys.argv[1]).read_text())))
