"""What is installed here and what would run: `python -m efficient_detr.info [--json]`.

Four tables: versions and devices, the operators with the implementation that each device would
use and the reason where it is not the compiled one, what the build noted, and the environment
variables in force. Paste it into bug reports.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import logging
import os
import pkgutil
import platform
import sys
from typing import Any

import torch
from tabulate import tabulate

import efficient_detr
from efficient_detr import ops
from efficient_detr.ops import library

ENVIRONMENT_VARIABLES = (
    "EFFICIENT_DETR_OPS",
    "EFFICIENT_DETR_BUILD_KERNELS",
    "EFFICIENT_DETR_BUILD_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "MAX_JOBS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "DETECTRON2_DATASETS",
)


def collect() -> dict[str, Any]:
    """Gathers everything that the command prints.

    Returns:
        "versions": name to version; "devices": "cpu" with its instruction set and number of
        threads, "cuda" with a name and capability for each GPU; "operators": see
        `describe_operators`; "kernels": for "cpu" and "cuda" whether the shared object exists and
        is loaded, and the problem if not; "build": what the build noted, {} if there was none;
        "environment": the variables that are set.
    """
    return {
        "versions": _versions(),
        "devices": _devices(),
        "operators": describe_operators(),
        "kernels": {
            part.device: {
                "path": str(part.path),
                "exists": part.exists,
                "loaded": part.loaded,
                "problem": part.problem,
            }
            for part in library.status()
        },
        "build": library.build_record(),
        "environment": {
            name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ
        },
    }


def _versions() -> dict[str, str]:
    return {
        "efficient_detr": efficient_detr.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "Detectron2": efficient_detr.detectron2_description().partition(": ")[2],
        "numpy": importlib.metadata.version("numpy"),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _devices() -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [
        {
            "name": torch.cuda.get_device_name(index),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
        }
        for index in range(count)
    ]
    cpu = {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    return {"cpu": cpu, "cuda": gpus}


def operator_names() -> list[str]:
    """The project's operators that can have compiled kernels, without the namespace."""
    for module in pkgutil.iter_modules(ops.__path__):
        if not module.name.startswith("_"):  # as the shared objects' names do
            importlib.import_module(f"{ops.__name__}.{module.name}")  # which defines its operators
    found = torch._C._dispatch_get_all_op_names()
    prefix = f"{library.NAMESPACE}::"
    return sorted({name[len(prefix) :] for name in found if name.startswith(prefix)})


def describe_operators() -> dict[str, dict[str, Any]]:
    """How each operator would run.

    Returns:
        By operator: "built", the device types that it has been compiled for; "runs", the
        implementation by device type; "why", by device type, the reason for anything but
        "compiled". Devices are those of this machine.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda")] if torch.cuda.is_available() else []
    library.load()
    described = {}
    for name in operator_names():
        built = [device for device in library.DEVICES if _is_compiled(name, device)]
        outcomes = {device.type: _outcome(device) for device in devices}
        described[name] = {
            "built": built,
            "runs": {device: runs for device, (runs, _) in outcomes.items()},
            "why": {device: why for device, (_, why) in outcomes.items() if why},
        }
    return described


def _is_compiled(operator: str, device_type: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{library.NAMESPACE}::{operator}", device_type.upper()
    )


def _outcome(device: torch.device) -> tuple[str, str]:
    """What runs on a device, and why that is not the compiled kernels."""
    try:
        choice = library.choose(device)
    except (RuntimeError, ValueError) as error:
        return "fails", str(error)
    if choice == "compiled":
        return choice, ""
    reason = library.missing_reason(device)
    return choice, reason or f"{library.ENVIRONMENT_VARIABLE}=pytorch"


def render(found: dict[str, Any]) -> str:
    """The tables for people."""
    sections = [
        _section("Versions and devices", _version_rows(found)),
        _section("Operators", _operator_rows(found["operators"])),
        _section("Compiled kernels", _kernel_rows(found)),
        _section("Environment", [*found["environment"].items()] or [["none of ours is set"]]),
    ]
    return "\n\n".join(sections) + "\n"


def _section(title: str, rows: list[Any]) -> str:
    return f"{title}\n{'-' * len(title)}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}"


def _version_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, gpus = found["devices"]["cpu"], found["devices"]["cuda"]
    rows = [*found["versions"].items(), ("CPU", f"{cpu['instructions']}, {cpu['threads']} threads")]
    rows += [
        (f"GPU {index}", f"{gpu['name']}, capability {gpu['capability']}")
        for index, gpu in enumerate(gpus)
    ]
    return rows if gpus else [*rows, ("GPU", "none")]


def _operator_rows(operators: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, operator in operators.items():
        built = ", ".join(operator["built"]) or "nothing"
        runs = ", ".join(f"{device}: {choice}" for device, choice in operator["runs"].items())
        rows.append((name, f"compiled for {built}; runs on {runs}"))
    reasons = {
        (device, why) for operator in operators.values() for device, why in operator["why"].items()
    }
    rows += [(f"why, on {device}", why) for device, why in sorted(reasons)]
    return rows or [("none", "no operator with kernels is defined")]


def _kernel_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for device, part in found["kernels"].items():
        rows.append((device, f"loaded from {part['path']}" if part["loaded"] else part["problem"]))
        entry = found["build"].get(device, {})
        rows += [
            (f"{device}, {key}", " ".join(value) if isinstance(value, list) else str(value))
            for key, value in entry.items()
            if key in ("state", "compiler", "nvcc", "architectures", "flags", "log")
        ]
    built_with = found["build"].get("torch")
    return [*rows, ("built with torch", built_with)] if built_with else rows


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables, or the same as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m efficient_detr.info", description="Show what is installed and what runs."
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    options = parser.parse_args(arguments)
    # What `choose` would log stands in the tables.
    logging.disable(logging.WARNING)
    try:
        found = collect()
    finally:
        logging.disable(logging.NOTSET)
    sys.stdout.write(json.dumps(found, indent=1) + "\n" if options.json else render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
