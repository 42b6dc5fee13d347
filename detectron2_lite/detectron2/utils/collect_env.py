"""What a bug report needs to know about the machine."""

import sys
from importlib.metadata import PackageNotFoundError, version

import torch
from tabulate import tabulate


def collect_env_info() -> str:
    """A table of versions and devices, then the build configuration of PyTorch."""
    rows = [("platform", sys.platform), ("Python", sys.version), ("PyTorch", torch.__version__)]
    for name in ("detectron2", "numpy", "pillow", "fvcore", "iopath", "omegaconf", "pycocotools"):
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    for index in range(torch.cuda.device_count()):
        rows.append((f"GPU {index}", torch.cuda.get_device_name(index)))
    return f"{tabulate(rows)}\n{torch.__config__.show()}"
