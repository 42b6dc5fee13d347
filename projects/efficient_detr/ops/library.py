"""Finds and loads the compiled kernels, and chooses between them and plain PyTorch.

Installing the package leaves up to two shared objects beside this file, `_kernels_cpu` and
`_kernels_cuda`, and `_kernels_build.json`, which says what was built and why the rest was not.
Loading one gives implementations to operators of the namespace `efficient_detr`, whose schemas are
defined in Python whether or not anything is compiled.

Nothing is loaded when this module is imported. `choose` is the one place that decides:

    argument `implementation`, else the environment variable EFFICIENT_DETR_OPS, else "auto"

"auto" takes the compiled kernels where they exist and fit, "compiled" insists on them and
"pytorch" keeps away from them. A decision is logged once, with the reason if kernels are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch

from efficient_detr.ops.contexts import needs_pytorch

Implementation = Literal["compiled", "pytorch"]

NAMESPACE = "efficient_detr"
ENVIRONMENT_VARIABLE = "EFFICIENT_DETR_OPS"
DEVICES = ("cpu", "cuda")
OLDEST_TORCH = (2, 11)
BUILD_COMMAND = "pip install --no-build-isolation -e ."

_LABELS = {"cpu": "CPU", "cuda": "CUDA"}
_SWITCHES = {"cpu": "EFFICIENT_DETR_BUILD_KERNELS", "cuda": "EFFICIENT_DETR_BUILD_CUDA"}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelLibrary:
    """One of the two shared objects.

    Attributes:
        device: "cpu" or "cuda".
        path: where it is, or would be.
        exists: whether the file is there.
        loaded: whether its operators can be called in this process.
        problem: why not, as a clause without a full stop; "" if it is loaded.
        record: what the build noted about it: state, reason, compiler, flags, architectures.
    """

    device: str
    path: Path
    exists: bool
    loaded: bool
    problem: str
    record: dict[str, Any] = field(default_factory=dict)


class KernelLoader:
    """Loads the shared objects in a folder, each at most once, from any thread.

    Args:
        folder: where the shared objects and the record of the build are.
        namespace: of the operators; each shared object must implement all of them.
    """

    def __init__(self, folder: Path, namespace: str = NAMESPACE) -> None:
        self.folder = folder
        self.namespace = namespace
        self._lock = threading.RLock()
        self._libraries: dict[str, KernelLibrary] = {}
        self._choices: dict[tuple[str, int | None, str], Implementation] = {}
        self._announced: set[tuple[str, str]] = set()

    def build_record(self) -> dict[str, Any]:
        """What the build left beside the package; empty if there is nothing of the right form."""
        try:
            record = json.loads((self.folder / "_kernels_build.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return record if _is_record(record) else {}

    def library(self, device_type: str) -> KernelLibrary:
        """Loads the shared object of a device type ("cpu" or "cuda") unless that has been tried."""
        with self._lock:
            if device_type not in self._libraries:
                self._libraries[device_type] = self._load(device_type)
            return self._libraries[device_type]

    def _load(self, device_type: str) -> KernelLibrary:
        record = self.build_record()
        entry = record.get(device_type, {})
        path = self.folder / f"_kernels_{device_type}.abi3.so"
        exists = path.exists()
        problem = (
            _torch_problem(device_type, record)
            or ("" if exists else _absence(device_type, entry))
            or _damage(path, device_type, entry)
            or _loading_problem(path, device_type, record)
            or _gap(self.namespace, device_type)
        )
        return KernelLibrary(device_type, path, exists, not problem, problem, entry)

    def problem(self, device: torch.device) -> str:
        """Why the compiled kernels cannot run on a device; "" if they can."""
        if device.type not in DEVICES:
            return f"there are no compiled kernels for devices of type {device.type}"
        library = self.library(device.type)
        if library.problem or device.type == "cpu":
            return library.problem
        return _architecture_problem(library.record.get("architectures"), device)

    def choose(self, device: torch.device, implementation: str | None) -> Implementation:
        """See `choose`, the function."""
        wanted = _wish(implementation)
        key = (device.type, device.index, wanted)
        choice = self._choices.get(key)
        if choice is None:
            with self._lock:
                choice = self._choices[key] = self._decide(device, wanted)
        return choice

    def check(self, device: torch.device) -> None:
        """See `check`, the function."""
        if _wish(None) == "compiled" and (problem := self.problem(device)):
            raise RuntimeError(_refusal(device, problem))

    def _decide(self, device: torch.device, wanted: str) -> Implementation:
        if wanted == "pytorch":
            self._announce(logging.INFO, device, "plain PyTorch, as asked for")
            return "pytorch"
        problem = self.problem(device)
        if not problem:
            self._announce(logging.INFO, device, "the compiled kernels")
            return "compiled"
        if wanted == "compiled":
            raise RuntimeError(_refusal(device, problem))
        if device.type in DEVICES:
            text = f"plain PyTorch, which is slower, because {problem}; {_remedy(device.type)}"
            self._announce(logging.WARNING, device, text)
        else:
            self._announce(logging.INFO, device, f"plain PyTorch, because {problem}")
        return "pytorch"

    def _announce(self, level: int, device: torch.device, text: str) -> None:
        # Once a device type, not once a GPU; but a second reason is news.
        if (device.type, text) not in self._announced:
            self._announced.add((device.type, text))
            _logger.log(level, "Operators on %s use %s.", device.type, text)


def _wish(implementation: str | None) -> str:
    """The argument `implementation`, else what the environment says."""
    wanted = implementation or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if wanted not in ("auto", "compiled", "pytorch"):
        source = "the argument implementation" if implementation else ENVIRONMENT_VARIABLE
        raise ValueError(f"{source} is {wanted!r}; it can be auto, compiled or pytorch.")
    return wanted


def _refusal(device: torch.device, problem: str) -> str:
    return (
        f"The compiled kernels were asked for on {device.type}, but {problem}; "
        f"{_remedy(device.type)}, or leave the choice to {ENVIRONMENT_VARIABLE}=auto."
    )


def _is_record(found: Any) -> bool:
    """Whether a file holds what a build writes, as far as anybody relies on it."""
    if not isinstance(found, dict):
        return False
    versions = (found.get(name) for name in ("torch", "torch_cuda"))
    return all(version is None or isinstance(version, str) for version in versions) and all(
        isinstance(entry, dict) and all(_is_noted(*noted) for noted in entry.items())
        for entry in (found.get(device_type, {}) for device_type in DEVICES)
    )


def _is_noted(name: str, value: Any) -> bool:
    if name in ("flags", "architectures", "output"):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def _remedy(device_type: str) -> str:
    if device_type not in DEVICES:
        return "move the model to cpu or cuda"
    return f"to build them, run `{_SWITCHES[device_type]}=1 {BUILD_COMMAND}` in the repository"


def _torch_problem(device_type: str, record: dict[str, Any]) -> str:
    """Why the torch at hand rules the kernels out before they are even looked at."""
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < OLDEST_TORCH:
        return f"the compiled kernels need torch 2.11 or newer, and this is {torch.__version__}"
    if device_type != "cuda":
        return ""
    cuda = torch.version.cuda
    if cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    built_for = record.get("torch_cuda")
    state = record.get("cuda", {}).get("state")
    if state == "built" and built_for and built_for.split(".")[0] != cuda.split(".")[0]:
        return (
            f"the CUDA kernels are built for another torch: for CUDA {built_for}, while torch "
            f"{torch.__version__} uses CUDA {cuda}"
        )
    return ""


def _absence(device_type: str, entry: dict[str, Any]) -> str:
    """Why a shared object is not there, from what the build noted."""
    kernels = f"the {_LABELS[device_type]} kernels"
    state, reason = entry.get("state"), entry.get("reason")
    if state == "switched off":
        return f"{kernels} were switched off when efficient_detr was installed ({reason})"
    if state == "not needed":
        return f"{kernels} are not built: the build was for another torch ({reason})"
    if reason:
        return f"{kernels} are not built: {reason}"
    if state == "built":
        return f"{kernels} were built, but the file is gone"
    return f"{kernels} are not built: the package was not installed by pip, or that was interrupted"


def _damage(path: Path, device_type: str, entry: dict[str, Any]) -> str:
    """Whether the file is the one that was built: loading a truncated one ends the process."""
    expected = entry.get("sha256")
    try:
        if expected in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
            return ""
    except OSError as error:
        return f"the {_LABELS[device_type]} kernels cannot be read ({error.strerror or error})"
    return (
        f"the {_LABELS[device_type]} kernels are built, but the file is damaged or replaced "
        f"({path.name} is not what the build noted)"
    )


def _gap(namespace: str, device_type: str) -> str:
    """Whether operators are still without a kernel, now that the shared object is loaded.

    Whoever calls has imported `efficient_detr.ops`, and with it all operators have been defined.
    """
    defined = torch._C._dispatch_get_all_op_names()
    missing = [
        name.removeprefix(f"{namespace}::")
        for name in sorted(defined)
        if name.startswith(f"{namespace}::")
        and not torch._C._dispatch_has_kernel_for_dispatch_key(name, device_type.upper())
    ]
    if not missing:
        return ""
    kernels = f"the {_LABELS[device_type]} kernels"
    return f"{kernels} are built from older sources, without {', '.join(missing)}"


def _loading_problem(path: Path, device_type: str, record: dict[str, Any]) -> str:
    """Loads a shared object; returns what went wrong, or ""."""
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError, AttributeError) as error:
        # torch only says that it could not load the file; the loader's message is the cause.
        message = str(error.__cause__ or error).replace(f"{path}: ", "").partition("\n")[0]
        kernels = f"the {_LABELS[device_type]} kernels"
        built_with = record.get("torch")
        if built_with and built_with != torch.__version__:
            return (
                f"{kernels} are built for another torch: for {built_with}, while this is "
                f"{torch.__version__} ({message})"
            )
        return f"{kernels} are built, but cannot be loaded ({message})"
    return ""


def _architecture_problem(architectures: list[str] | None, device: torch.device) -> str:
    """Whether the GPU is one of those that the kernels were compiled for."""
    if not architectures:
        return ""
    capability = torch.cuda.get_device_capability(device)
    if any(covers(architecture, capability) for architecture in architectures):
        return ""
    return (
        f"the CUDA kernels are built for GPUs of capability {', '.join(architectures)}, while "
        f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    )


def covers(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a GPU.

    Args:
        architecture: "9.0"; "9.0a" or "10.0f" for code with extras of one GPU or family; "9.0+PTX"
            if the code can be compiled further for newer GPUs.
        capability: (major, minor) of the GPU.
    """
    parts = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
    if parts is None:
        return False
    built_for = (int(parts[1]), int(parts[2]))
    if parts[3] == "a":
        return built_for == capability
    if parts[4] and not parts[3]:
        return built_for <= capability
    return built_for[0] == capability[0] and built_for[1] <= capability[1]


_loader = KernelLoader(Path(__file__).parent)


def choose(device: torch.device, implementation: str | None = None) -> Implementation:
    """Decides how an operator runs on a device, and logs it when it does so for the first time.

    torch.compile and torch.export evaluate it once, while tracing: a compiled model keeps what was
    chosen then.

    Args:
        device: where the operator's tensors are.
        implementation: "compiled", "pytorch" or "auto"; None for what EFFICIENT_DETR_OPS says,
            which is "auto" unless set.

    Returns:
        "compiled" if the kernels exist for this device and torch, and are not declined; always
        "pytorch" where `contexts.needs_pytorch` says so.

    Raises:
        ValueError: if the wish is none of the three.
        RuntimeError: if "compiled" is asked for and not possible.
    """
    if needs_pytorch():
        return "pytorch"
    return _loader.choose(device, implementation)


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes
# seconds. Locks, files and logging inside `choose` could not be traced.
cast(Any, choose)._dynamo_marked_constant = True


def check(device: torch.device) -> None:
    """Raises what `choose` would raise on a device for what EFFICIENT_DETR_OPS says; logs nothing.

    Raises:
        ValueError: if EFFICIENT_DETR_OPS is none of auto, compiled and pytorch.
        RuntimeError: if it is "compiled" and that is not possible.
    """
    _loader.check(device)


def load() -> None:
    """Loads the shared objects that exist and fit; a second call does nothing."""
    for device_type in DEVICES:
        _loader.library(device_type)


def status() -> list[KernelLibrary]:
    """Loads what can be loaded and describes it, the CPU's kernels first."""
    return [_loader.library(device_type) for device_type in DEVICES]


def missing_reason(device: torch.device) -> str:
    """Why the compiled kernels cannot run on a device; "" if they can."""
    return _loader.problem(device)


def build_record() -> dict[str, Any]:
    """What the build left beside the package; empty if there was none."""
    return _loader.build_record()
