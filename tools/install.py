"""Prepares the virtual environment of this repository; `make install` calls it.

Four steps, each done only when something it depends on has changed: torch, the pinned rest,
Detectron2, the project. A step that succeeds leaves a stamp in the environment: a line of text
with everything it depended on. A call that finds all stamps up to date installs nothing and needs
no network.

    python tools/install.py --venv .venv --torch torch==2.13.0

It runs on the standard library alone, since it is what installs everything else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 11)
REQUIREMENTS = ("requirements/runtime.txt", "requirements/development.txt")
PINS = "requirements/constraints.txt"
LITE = ROOT / "detectron2_lite"
# Every build of the kernels leaves it, even one that builds nothing; `make clean` deletes it.
KERNEL_RECORD = ROOT / "projects" / "efficient_detr" / "ops" / "_kernels_build.json"
SOURCE_SUFFIXES = (".h", ".cuh", ".cpp", ".cu")
BUILD_VARIABLES = (
    "EFFICIENT_DETR_BUILD_KERNELS",
    "EFFICIENT_DETR_BUILD_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
)

# What `Environment.probe` finds: the versions of Python and of packages, None for an absent one.
Versions = dict[str, "str | None"]

# Runs inside the environment. Versions come from the metadata: importing torch would take seconds.
PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
found = {name: version(name) for name in ("torch", "torchvision", "detectron2", "efficient_detr")}
spec = importlib.util.find_spec("detectron2")
if found["detectron2"] is None and spec is not None and spec.origin is not None:
    found["detectron2"] = "unknown version"
found["python"] = ".".join(map(str, sys.version_info[:2]))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Options:
    """What the caller asked for.

    Attributes:
        torch: what pip installs for torch: requirements and pip options, as one line.
        torch_is_default: whether `torch` is merely the Makefile's default; an environment that
            has a torch of its own then keeps it.
        detectron2: a pip requirement of the real Detectron2, or "" for whichever is there already,
            else detectron2_lite.
    """

    torch: str
    torch_is_default: bool
    detectron2: str


@dataclass(frozen=True)
class Situation:
    """What a step is planned from.

    Attributes:
        options: what the caller asked for.
        versions: what `Environment.probe` found.
        stamp: what the step left when it last succeeded; "" if it never did.
        constraints: the file of constraints that keeps torch as it is.
    """

    options: Options
    versions: Versions
    stamp: str
    constraints: Path


@dataclass(frozen=True)
class Step:
    """One call of pip.

    Attributes:
        stamp: everything the outcome depends on.
        arguments: what follows `pip install`; None to keep what the environment already has.
        package: the distribution without which the step does not count as done; "" for none.
        product: a file without which it does not either.
    """

    stamp: str
    arguments: list[str] | None
    package: str = ""
    product: Path | None = None


class InstallationError(Exception):
    """The environment cannot be prepared; the text says why and what to do."""


class Environment:
    """A virtual environment and the stamps in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.records = path / ".efficient_detr"
        self.constraints = self.records / "constraints.txt"
        self._made_here = self.records / "made_here"
        self._unfinished = self.records / "unfinished"

    def probe(self) -> Versions | None:
        """What is installed here, or None if no Python runs here."""
        try:
            answer = subprocess.run(
                [self.python, "-c", PROBE], capture_output=True, text=True, check=True
            )
            versions: Versions = json.loads(answer.stdout)
        except (OSError, subprocess.CalledProcessError, json.JSONDecodeError):
            return None
        return versions

    def prepare(self, python: str | None) -> Versions:
        """Creates the environment unless a working one is there.

        Args:
            python: the version of Python ("3.12") that it must have, or None for any.
        """
        versions = self.probe()
        if self._made_here.exists() and (versions is None or self._unfinished.exists()):
            say(f"{self.path} was left unfinished; starting afresh")
            self._wipe()
            versions = None
        if versions is None:
            self._create()
            versions = self.probe()
        if versions is None:
            raise InstallationError(
                f"{self.python} does not run; delete {self.path} and try again."
            )
        if python is not None and versions["python"] != python:
            raise InstallationError(
                f"{self.path} has Python {versions['python']}, but PYTHON= names Python {python}; "
                f"delete {self.path} or choose another folder with VENV=."
            )
        return versions

    def _wipe(self) -> None:
        # The records last: they tell an unfinished environment from somebody else's folder.
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry == self.records):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _create(self) -> None:
        if self.path.exists() and set(self.path.iterdir()) - {self.records}:
            raise InstallationError(
                f"{self.path} holds no working Python; delete it or choose another with VENV=."
            )
        module = environment_module()
        say(f"creating {self.path}")
        self.records.mkdir(parents=True, exist_ok=True)
        self._made_here.touch()
        self._unfinished.touch()
        run([sys.executable, "-m", module, str(self.path)], f"Creating {self.path}")
        self._unfinished.unlink()

    def stamp(self, name: str) -> str:
        """What a step left when it last succeeded; empty if it never did."""
        try:
            return (self.records / name).read_text()
        except FileNotFoundError:
            return ""

    def carry_out(self, name: str, step: Step, versions: Versions) -> None:
        """Runs pip, if the step asks for it, and leaves the stamp."""
        self.records.mkdir(exist_ok=True)
        stamp = self.records / name
        if step.arguments is not None:
            stamp.unlink(missing_ok=True)
            torches = [key for key in ("torch", "torchvision") if versions[key]]
            replace_text(self.constraints, "".join(f"{t}=={versions[t]}\n" for t in torches))
            # Stays behind if this process is killed; when pip merely fails, it cleans up by itself.
            self._unfinished.touch()
            try:
                self._pip_install(name, step.arguments)
            except InstallationError:
                self._unfinished.unlink()
                raise
            self._unfinished.unlink()
        replace_text(stamp, step.stamp)

    def _pip_install(self, name: str, arguments: list[str]) -> None:
        say(f"installing {name}")
        # torch is big: its progress bar is welcome.
        quiet = [] if name == "torch" else ["--quiet"]
        pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", *quiet]
        run([*pip, *arguments], f"Installing {name}")


def say(text: str) -> None:
    """Prints at once, so that the lines keep their place among pip's."""
    print(f"-- {text}", flush=True)


def run(command: list[str], what: str) -> None:
    """Runs a command in the repository; a failure becomes an `InstallationError`."""
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode != 0:
        raise InstallationError(
            f"{what} failed; the reason stands above. Mend it and run make again."
        )


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one go."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def digest(files: Iterable[Path]) -> str:
    """A hash over the contents of files; a file that is missing counts as empty."""
    total = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()[:16]


def environment_module() -> str:
    """The module that can create a virtual environment with this Python."""
    for module, needs in (("venv", "ensurepip"), ("virtualenv", "virtualenv")):
        # Debian ships venv without ensurepip, on which it depends.
        if can_import(module) and can_import(needs):
            return module
    raise InstallationError(
        f"{sys.executable} cannot create virtual environments; install its venv module "
        "(on Debian and Ubuntu: apt install python3-venv) or virtualenv (pip install virtualenv)."
    )


def can_import(module: str) -> bool:
    """Whether a module can be imported by the Python that runs this script."""
    return find_spec(module) is not None


def torch_step(now: Situation) -> Step:
    """The pinned torch, or the one that the environment has and nobody asked to change."""
    wanted = ("default: " if now.options.torch_is_default else "asked for: ") + now.options.torch
    installed = now.versions["torch"]
    chosen_by_user = installed is not None and not now.stamp.startswith("default: ")
    if not (now.options.torch_is_default and chosen_by_user):
        return Step(wanted, shlex.split(now.options.torch), "torch")
    if release(str(installed)) < OLDEST_TORCH:
        raise InstallationError(
            f"The environment has torch {installed}, but the project needs 2.11 or newer; "
            f"upgrade it, for example with TORCH={now.options.torch}."
        )
    return Step(now.stamp or f"found: {installed}", None, "torch")


def release(version: str) -> tuple[int, ...]:
    """(2, 13) for "2.13.0+cpu"."""
    return tuple(int(part) for part in version.split(".")[:2])


def requirements_step(now: Situation) -> Step:
    """The pinned libraries for running, testing and checking."""
    files = [part for name in REQUIREMENTS for part in ("-r", name)]
    stamp = digest(ROOT / name for name in (*REQUIREMENTS, PINS))
    return Step(stamp, [*files, "-c", PINS, "-c", str(now.constraints)])


def detectron2_step(now: Situation) -> Step:
    """The Detectron2 asked for, else a real one that is there already, else detectron2_lite."""
    # Without build isolation, because the real one compiles against the torch of the environment.
    arguments = ["--no-build-isolation", "-c", str(now.constraints)]
    if now.options.detectron2:
        # It imports torchvision without listing it as a requirement.
        arguments += [*shlex.split(now.options.detectron2), "torchvision"]
        stamp = f"asked for: {now.options.detectron2} torch {now.versions['torch']}"
        return Step(stamp, arguments, "detectron2")
    installed = now.versions["detectron2"]
    if installed is not None and "lite" not in installed:
        return Step(now.stamp or f"found: {installed}", None, "detectron2")
    packaging = [
        LITE / "pyproject.toml",
        LITE / "setup.py",
        *sorted(LITE.glob("build_backend/*.py")),
    ]
    # "compat" makes it importable through a plain path, which type checkers and editors can follow.
    arguments += ["--config-settings", "editable_mode=compat", "--editable", str(LITE)]
    return Step(f"lite: {digest(packaging)} at {LITE}", arguments, "detectron2")


def project_step(now: Situation) -> Step:
    """The project itself, editable, with its kernels compiled where that is possible."""
    packaging = digest(ROOT / name for name in ("pyproject.toml", "setup.py", "setup_kernels.py"))
    stamp = (
        f"{packaging} at {ROOT} torch {now.versions['torch']} "
        f"kernels {kernel_sources(ROOT / 'kernels')} {compilers()}"
    )
    arguments = ["--no-build-isolation", "-c", str(now.constraints), "--editable", str(ROOT)]
    return Step(stamp, arguments, "efficient_detr", KERNEL_RECORD)


def kernel_sources(folder: Path) -> str:
    """A hash over the names and contents of all files that are compiled."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in SOURCE_SUFFIXES)
    names = hashlib.sha256("\n".join(str(file.relative_to(folder)) for file in files).encode())
    return f"{names.hexdigest()[:8]}-{digest(files)}"


def compilers() -> str:
    """What decides whether and how kernels are compiled, apart from the sources."""
    programs = [os.environ.get("CXX", "").split(" ")[-1], "c++", "g++", "clang++", "nvcc"]
    found = [shutil.which(name) for name in programs if name]
    wishes = [f"{name}={os.environ[name]}" for name in BUILD_VARIABLES if name in os.environ]
    return " ".join([*(path for path in found if path), *wishes])


STEPS = {
    "torch": torch_step,
    "requirements": requirements_step,
    "detectron2": detectron2_step,
    "efficient_detr": project_step,
}


def install(environment: Environment, options: Options, python: str | None) -> bool:
    """Brings the environment up to date.

    Args:
        environment: where to install; created if it does not exist.
        options: what the caller asked for.
        python: the version of Python ("3.12") that the environment must have, or None for any.

    Returns:
        Whether anything had to be installed.
    """
    versions = environment.prepare(python)
    changed = False
    for name, plan in STEPS.items():
        situation = Situation(options, versions, environment.stamp(name), environment.constraints)
        step = plan(situation)
        is_there = not step.package or versions[step.package] is not None
        is_there &= step.product is None or step.product.exists()
        if is_there and situation.stamp == step.stamp:
            continue
        environment.carry_out(name, step, versions)
        if step.arguments is not None:
            changed = True
            versions = environment.probe() or versions
    return changed


def kernel_report(record: Path) -> list[str]:
    """What the build noted about the compiled kernels, a line for each device worth mentioning."""
    try:
        entries = json.loads(record.read_text())
    except (OSError, ValueError):
        return []
    lines = []
    for device in ("cpu", "cuda"):
        entry = entries.get(device, {})
        if entry.get("state") == "built":
            lines.append(f"operators on {device}: compiled")
        elif entry.get("state") not in (None, "not needed"):
            log = f"; see {entry['log']}" if "log" in entry else ""
            lines.append(
                f"operators on {device}: plain PyTorch, which is slower, because the kernels "
                f"were not built: {entry.get('reason')}{log}"
            )
    return lines


def main() -> int:
    """Reads the command line and installs."""
    parser = argparse.ArgumentParser(
        description="Prepare the virtual environment of this repository."
    )
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--torch", default="torch", help="what pip installs for torch")
    parser.add_argument(
        "--torch-is-default", action="store_true", help="keep a torch that is there"
    )
    parser.add_argument("--detectron2", default="", help="pip requirement of the real Detectron2")
    parser.add_argument(
        "--this-python", action="store_true", help="insist on this Python's version"
    )
    arguments = parser.parse_args()

    python = ".".join(map(str, sys.version_info[:2])) if arguments.this_python else None
    options = Options(arguments.torch, arguments.torch_is_default, arguments.detectron2)
    try:
        environment = Environment((ROOT / arguments.venv).absolute())
        if install(environment, options, python):
            for line in kernel_report(KERNEL_RECORD):
                say(line)
            say("installed")
    except InstallationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
