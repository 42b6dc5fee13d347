"""What a bug report needs to know about the machine."""

import importlib
import os
import sys

import torch
from tabulate import tabulate


def collect_env_info() -> str:
    """A table of versions and devices, then the build configuration of PyTorch."""
    import detectron2

    rows = [
        ("sys.platform", sys.platform),
        ("Python", sys.version.replace("\n", "")),
        ("detectron2", f"lite {detectron2.__version__} @{os.path.dirname(detectron2.__file__)}"),
        ("PyTorch", f"{torch.__version__} @{os.path.dirname(torch.__file__)}"),
        ("GPU available", "Yes" if torch.cuda.is_available() else "No"),
    ]
    for index in range(torch.cuda.device_count()):
        rows.append((f"GPU {index}", torch.cuda.get_device_name(index)))
    for name in ("numpy", "PIL", "fvcore", "iopath", "omegaconf", "cv2"):
        try:
            rows.append((name, importlib.import_module(name).__version__))
        except ImportError:
            rows.append((name, "not installed"))
    return tabulate(rows) + "\n" + torch.__config__.show()
