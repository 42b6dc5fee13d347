"""Files of checkpoints: written whole, and read without running any code that they may hold."""

from __future__ import annotations

import argparse
import codecs
import collections
import os
import pathlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from functools import cache
from typing import IO, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from efficient_detr.checkpoint.caffe2 import rename_resnet
from efficient_detr.errors import UserError
from efficient_detr.files import replaced_file

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
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    SafetensorError,
)
"""What reading a file that is damaged, or no checkpoint at all, has been seen to raise."""

# In PyTorch's errors: a name that it does not allow, something that it does not do with a name that
# it allows, and any other reason, which only a damaged file gives.
_REFUSED_NAME = re.compile(r"(?:Unsupported global:|unsupported) GLOBAL (\S+)")
_REFUSED_CALL = re.compile(r"unrecognized function|Can only (?:create|build)|must be imported")
_DAMAGE = re.compile(r"WeightsUnpickler error:\s+(.+)")
# In errors of safetensors.
_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")
_BLOCK = 1 << 20

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
        wherever the file has them: as the entry "model" or "state_dict", or alone. A ResNet of
        Caffe2 gets Detectron2's names, and other files of Caffe2 the entries that tell Detectron2
        what they are.

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


def write_checkpoint(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], entries: Mapping[str, Any]
) -> None:
    """Write weights as authors do: as the entry "model", or alone in a ``.safetensors``.

    Args:
        path: the file to make or replace, which is written whole or not at all.
        weights: key -> tensor; tensors may share memory.
        entries: what stands beside the weights; not in a ``.safetensors``.

    Raises:
        UserError: if the file cannot be written. An existing one is then as it was.
    """
    try:
        with replaced_file(path) as partial_path:
            if partial_path.suffix == ".safetensors":
                # Each tensor has to have memory of its own.
                alone = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
                save_file(alone, partial_path, metadata={"format": "pt"})
            else:
                _save({"model": dict(weights), **entries}, partial_path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{os.fspath(path)} cannot be written ({_reason(error)}): give a file in a folder that "
            "you may write to, on a disk with enough room."
        ) from error


class _Writer:
    """Passes on to a file what PyTorch writes, and keeps the error that PyTorch would hide.

    Args:
        file: the open file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write, or after an error pretend to: PyTorch would end the process."""
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: closing the file does it."""


def _save(content: dict[str, Any], path: pathlib.Path) -> None:
    with open(path, "wb") as file:
        writer = _Writer(file)
        torch.save(content, cast(IO[bytes], writer))
        if writer.error is not None:
            raise writer.error


def _reason(error: BaseException) -> str:
    """What the system says of an error of writing."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = _ERROR_NUMBER.search(str(error))
    return os.strerror(int(number[1])) if number else str(error)


def unreadable(name: str, error: BaseException) -> UserError:
    """What to raise for an error of reading; PyTorch's advice to allow code is left out.

    Args:
        name: of the file.
        error: one of `READ_ERRORS`.
    """
    text = str(error)
    if "TorchScript" in text:
        return _holds_code(name, "a program in TorchScript")
    # Detectron2 also calls a query in the path "Unsupported", with a ValueError.
    if isinstance(error, pickle.UnpicklingError):
        refused = _REFUSED_NAME.search(text)
        if refused or _REFUSED_CALL.search(text):
            return _holds_code(name, refused[1] if refused else "objects that are not tensors")
        damage = _DAMAGE.search(text)
        text = damage[1] if damage else text
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
    if head == b"P":
        _check_archive(path)
    elif not _is_of_torch_save(path):
        return _read_pickle(path, name)
    allowed: list[Any] = [(value, key) for key, value in _harmless().items()]
    with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
        # What it cannot read for its protocol raises an error anyway.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        return content
    entry = next((one for one in _ENTRIES if isinstance(content.get(one), dict)), None)
    if entry is None:
        return {"model": content}
    return content if entry == "model" else {"model": content.pop(entry), **content}


def _check_archive(path: str) -> None:
    """Compare every part of an archive with its checksum, which PyTorch does not.

    Raises:
        ValueError: if the file is not whole.
        BadZipFile: if a part is not as it was written.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("the end of the file is missing")
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            # PyTorch can be told to write no checksums.
            if part.CRC == 0:
                continue
            with archive.open(part) as file:
                while file.read(_BLOCK):
                    pass


def _is_of_torch_save(path: str) -> bool:
    """Whether a pickle begins as those of ``torch.save`` did before it wrote archives."""
    magic = torch.serialization.MAGIC_NUMBER
    begins = tuple(pickle.dumps(magic, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1))
    with open(path, "rb") as file:
        return file.read(max(map(len, begins))).startswith(begins)


def _read_pickle(path: str, name: str) -> Any:
    """Read a ``.pkl`` of the model zoo, of Caffe2, or of a dict of arrays, as Detectron2 would."""
    with open(path, "rb") as file:
        content = _HarmlessUnpickler(file, name).load()
    if not isinstance(content, dict) or isinstance(content.get("model"), dict):
        return content
    # A file of Caffe2.
    blobs = content.get("blobs", content)
    if not isinstance(blobs, dict):
        return None
    weights = {key: value for key, value in blobs.items() if not str(key).endswith("_momentum")}
    if (resnet := rename_resnet(weights)) is not None:
        return {"model": resnet, "matching_heuristics": True}
    # The names of its detectors are left to Detectron2.
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
    # Of a damaged file, anything could be in it.
    what = what.encode("unicode_escape").decode()
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
