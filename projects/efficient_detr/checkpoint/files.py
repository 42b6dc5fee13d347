"""Files of checkpoints, read without running any code that they may hold."""

from __future__ import annotations

import argparse
import codecs
import collections
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from functools import cache
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from efficient_detr.errors import UserError

READ_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    AssertionError,
    pickle.UnpicklingError,
    LookupError,
    ValueError,
    AttributeError,
    TypeError,
    ImportError,
    OverflowError,
    SafetensorError,
)
"""What reading a file that is damaged, or no checkpoint at all, has been seen to raise."""

# In PyTorch's error.
_REFUSED_NAME = re.compile(r"Unsupported global: GLOBAL (\S+)")

_ENTRIES = ("model", "state_dict")


# Settings that authors pickled beside their weights: whatever has one of these names in a file
# becomes a plain dict of Python's, so that no code of others runs.
_SETTINGS = (
    "yacs.config.CfgNode",
    "addict.dict.Dict",
    "addict.addict.Dict",
    "util.slconfig.ConfigDict",
)


class DamagedCheckpointError(UserError):
    """A file of weights is incomplete, or no such file at all."""


def read_checkpoint(path: str | os.PathLike[str], name: str | None = None) -> dict[str, Any]:
    """Read a file of weights: of ``torch.save``, ``.safetensors``, or a ``.pkl`` of arrays.

    Besides tensors and Python's own types a file may hold NumPy arrays and numbers, paths, and
    settings of argparse, yacs and addict. Anything else is refused, because reading it would run
    code of the file.

    Args:
        path: the file. What follows a "?" in its name, as in addresses, is no part of its ending.
        name: what messages call the file; None for ``path``.

    Returns:
        The entries of the file; "model" holds the weights, our or foreign key -> tensor on the CPU,
        wherever the file has them: as the entry "model" or "state_dict", or alone. A ``.pkl`` of
        Caffe2 gets the entries that tell Detectron2 so.

    Raises:
        DamagedCheckpointError: if the file cannot be read.
        UserError: if it holds code, or no weights.
    """
    path, name = os.fspath(path), name or os.fspath(path)
    try:
        content = _read(path, name)
    except READ_ERRORS as error:
        raise unreadable(name, error) from error
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, Mapping) or not weights:
        raise _no_weights(name)
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor | np.ndarray):
            raise _no_weights(name)
    content["model"] = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in weights.items()
    }
    return content


def unreadable(name: str, error: BaseException) -> UserError:
    """What to raise for an error of reading; PyTorch's advice to allow code is left out.

    Args:
        name: of the file.
        error: one of `READ_ERRORS`.
    """
    text = str(error)
    # Detectron2 also calls a query in the path "Unsupported", with a ValueError.
    refused = isinstance(error, pickle.UnpicklingError) and "Unsupported" in text
    if refused or "weights_only" in text or "Weights only" in text:
        found = _REFUSED_NAME.search(text)
        return _holds_code(name, found[1] if found else "objects that are not tensors")
    reason = (text.strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return DamagedCheckpointError(
        f"The checkpoint {name} cannot be loaded ({reason}): check the path and whether the file "
        "is complete."
    )


def _read(path: str, name: str) -> Any:
    ending = os.path.splitext(path.partition("?")[0])[1].lower()
    if ending == ".pkl":
        return _read_pickle(path, name)
    if ending == ".safetensors":
        return {"model": load_file(path)}
    with open(path, "rb") as file:
        head = file.read(1)
    # Of a ZIP archive and of a pickle, the two formats of torch.save.
    if head not in (b"P", b"\x80"):
        raise ValueError("it is not a file of torch.save")
    if head == b"P" and not zipfile.is_zipfile(path):
        raise ValueError("the end of the file is missing")
    with torch.serialization.safe_globals([(value, key) for key, value in _harmless().items()]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        return content
    entry = next((one for one in _ENTRIES if isinstance(content.get(one), dict)), None)
    if entry is None:
        return {"model": content}
    return content if entry == "model" else {"model": content.pop(entry), **content}


def _read_pickle(path: str, name: str) -> Any:
    """Read a ``.pkl`` of the model zoo, of Caffe2, or of a dict of arrays, as Detectron2 would."""
    with open(path, "rb") as file:
        content = _HarmlessUnpickler(file, name).load()
    if not isinstance(content, dict) or isinstance(content.get("model"), dict):
        return content
    # A file of Caffe2: Detectron2 converts the names.
    blobs = content.get("blobs", content)
    if not isinstance(blobs, dict):
        return None
    weights = {key: value for key, value in blobs.items() if not str(key).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


class _HarmlessUnpickler(pickle.Unpickler):
    """Reads dicts of NumPy arrays and refuses whatever else a pickle could call.

    Args:
        file: the open file.
        name: of the file, for the error.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        # Files of the Detectron2 model zoo were written by Python 2.
        super().__init__(file, encoding="latin1")
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up among the allowed ones instead of importing it."""
        found = _harmless().get(f"{module}.{name}")
        if found is None:
            raise _holds_code(self._name, f"{module}.{name}")
        return found


@cache
def _harmless() -> dict[str, Any]:
    """Names in files -> what they stand for: nothing that does more than hold values."""
    names: dict[str, Any] = {
        "collections.OrderedDict": collections.OrderedDict,
        "argparse.Namespace": argparse.Namespace,
        "_codecs.encode": codecs.encode,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
    }
    for core in ("numpy.core", "numpy._core"):
        # NumPy says itself which private functions re-create its objects.
        names[f"{core}.multiarray._reconstruct"] = np.zeros(1).__reduce__()[0]
        names[f"{core}.multiarray.scalar"] = np.float64(0).__reduce__()[0]
        names[f"{core}.numeric._frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]
    for kind in vars(np.dtypes).values():
        if isinstance(kind, type) and issubclass(kind, np.dtype):
            names[f"numpy.dtypes.{kind.__name__}"] = kind
    # The paths of another system cannot be made on this one, so all become pure.
    for module in ("pathlib", "pathlib._local"):
        for system in ("Posix", "Windows"):
            pure = getattr(pathlib, f"Pure{system}Path")
            names |= {f"{module}.{system}Path": pure, f"{module}.Pure{system}Path": pure}
    return names | dict.fromkeys(_SETTINGS, collections.OrderedDict)


def _holds_code(name: str, what: str) -> UserError:
    return UserError(
        f"The checkpoint {name} holds code ({what}) and is refused, because reading it could run "
        "anything: where nothing can be harmed, such as a throw-away container with its authors' "
        "code, load it and save its state dict alone with torch.save or as .safetensors."
    )


def _no_weights(name: str) -> UserError:
    return UserError(
        f"The checkpoint {name} holds no weights: a dict of named tensors is expected, alone or as "
        "the entry 'model' or 'state_dict' of a dict."
    )
