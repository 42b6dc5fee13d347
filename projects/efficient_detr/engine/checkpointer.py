"""Checkpoints that are complete or absent, and loading that says what did not fit."""

import codecs
import collections
import glob
import logging
import os
import pickle
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors import SafetensorError
from safetensors.torch import load_file
from tabulate import tabulate

from efficient_detr.checkpoint.backbones import (
    convert_backbone,
    resize_tables,
    without_parallel_prefix,
)
from efficient_detr.checkpoint.report import LoadReport
from efficient_detr.errors import UserError
from efficient_detr.files import replaced_file

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"

# What reading a file that is damaged, or no checkpoint at all, has been seen to raise.
_READ_ERRORS = (
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

# Settings that authors pickled beside their weights: whatever has this name in a file becomes a
# plain dict of Python's, so that no code of others runs.
_SETTINGS: list[Any] = [(collections.OrderedDict, "yacs.config.CfgNode")]


def _array_names() -> dict[str, Any]:
    """All that a pickled dict of arrays refers to, with the old and the new names in NumPy."""
    names: dict[str, Any] = {
        "collections.OrderedDict": collections.OrderedDict,
        "_codecs.encode": codecs.encode,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
    }
    for core in ("numpy.core", "numpy._core"):
        # NumPy says itself which private functions re-create its objects.
        names[f"{core}.multiarray._reconstruct"] = np.zeros(1).__reduce__()[0]
        names[f"{core}.multiarray.scalar"] = np.float64(0).__reduce__()[0]
        names[f"{core}.numeric._frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]
    return names


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts of numpy arrays and refuses whatever else a pickle could call.

    Args:
        file: the open file.
        path: its path, for the error.
    """

    _NAMES = _array_names()

    def __init__(self, file: IO[bytes], path: str) -> None:
        # Files of the Detectron2 model zoo were written by Python 2.
        super().__init__(file, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up among the allowed ones instead of importing it."""
        if f"{module}.{name}" in self._NAMES:
            return self._NAMES[f"{module}.{name}"]
        if module == "numpy.dtypes" and name.isidentifier():
            found = getattr(np.dtypes, name, None)
            if isinstance(found, type) and issubclass(found, np.dtype):
                return found
        raise UserError(
            f"The checkpoint {self._path} holds code ({module}.{name}) and is refused: convert it "
            "to a .pth file that holds only the state dict."
        )


def _load_pickle(path: str) -> dict[str, Any]:
    """Read a ``.pkl`` of the model zoo, of Caffe2, or of a dict of arrays, as Detectron2 would."""
    with open(path, "rb") as file:
        data = _ArrayUnpickler(file, path).load()
    if not isinstance(data, dict):
        raise _no_weights(path)
    if isinstance(data.get("model"), dict):
        return data
    # A file of Caffe2: Detectron2 converts the names.
    data = data.get("blobs", data)
    if not isinstance(data, dict):
        raise _no_weights(path)
    weights = {key: value for key, value in data.items() if not str(key).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _no_weights(path: str) -> UserError:
    return UserError(
        f"The checkpoint {path} holds no weights: a dict of named tensors is expected, alone or as "
        "the entry 'model' or 'state_dict' of a dict."
    )


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes, safe reads and a table of skipped weights.

    A checkpoint is written beside its final name and renamed when it is complete, so a run that is
    killed while it saves leaves the previous checkpoint usable. No file can run code when it is
    read: neither ``.pth`` nor ``.pkl`` nor ``.safetensors``.

    Checkpoints with a backbone that `convert_backbone` knows, and otherwise of another model, are
    loaded into the backbone of the model, with a table of what became of their weights.
    """

    # True while `resume` loads, which takes only a file that fits the model completely.
    _resuming = False
    # True from the moment the weights are in the model; what follows are the checkpointables.
    _weights_loaded = False
    # Set where only the backbone of the file was loaded.
    _report: LoadReport | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model and the checkpointables.

        Args:
            name: file name without ``.pth``, in ``save_dir``.
            **kwargs: further entries of the file.
        """
        super().save(name + _PARTIAL, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Rename the finished file and make it the one that ``--resume`` takes.

        The base class calls this as the last step of ``save``.
        """
        final = last_filename_basename.replace(_PARTIAL, "")
        source = os.path.join(self.save_dir, last_filename_basename)
        if source != os.path.join(self.save_dir, final):
            os.replace(source, os.path.join(self.save_dir, final))
        with replaced_file(os.path.join(self.save_dir, "last_checkpoint")) as partial_path:
            partial_path.write_text(final, encoding="utf-8")

    def remove_partial_files(self) -> None:
        """Delete what killed runs left of unfinished checkpoints in ``save_dir``."""
        if not self.save_dir or not self.save_to_disk:
            return
        pattern = os.path.join(glob.escape(self.save_dir), f"model_*{_PARTIAL}.pth")
        for path in filter(os.path.isfile, glob.glob(pattern)):
            os.remove(path)
            logger.info("Removed the unfinished checkpoint %s", path)

    def resume(self, path: str) -> dict[str, Any]:
        """Load a file that this training wrote, with all checkpointables.

        Args:
            path: the file.

        Returns:
            As :meth:`load`.

        Raises:
            UserError: if the file cannot be read, or is not of this model and optimizer.
        """
        self._resuming = True
        try:
            return self.load(path)
        finally:
            self._resuming = False

    def load(
        self, path: str, checkpointables: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Load a file; see Detectron2's ``DetectionCheckpointer.load``.

        Args:
            path: file or address; '' loads nothing, with a warning if there is nothing to train.
            checkpointables: names of those to load, None for all.
            **kwargs: further arguments of the base class.

        Returns:
            The entries of the file that are not loaded into anything.

        Raises:
            UserError: if the file is missing, damaged, holds code or fits no weight of the model.
        """
        if not path:
            if self.checkpointables:
                logger.info("No checkpoint given: the model starts from its initial weights.")
            else:
                logger.warning(
                    "train.init_checkpoint is empty: the weights are random and the predictions "
                    "meaningless."
                )
            return {}
        self._weights_loaded = False
        self._report = None
        try:
            loaded: dict[str, Any] = super().load(path, checkpointables, **kwargs)
            return loaded
        except UserError:
            raise
        except _READ_ERRORS as error:
            if self._resuming and self._weights_loaded:
                raise self._of_another_config(path) from error
            raise UserError(_unreadable(path, error)) from error
        finally:
            # Detectron2 leaves it set when loading fails, and then refuses every further load.
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        # Detectron2 would run the code in a .pkl file.
        if filename.endswith(".pkl"):
            loaded = _load_pickle(filename)
        else:
            loaded = super()._load_file(filename)
        weights = loaded["model"]
        if not isinstance(weights, Mapping) or not weights:
            raise _no_weights(filename)
        for name, value in weights.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor | np.ndarray):
                raise _no_weights(filename)
        self._filename = filename
        return loaded

    def _torch_load(self, filename: str) -> Any:
        if filename.endswith(".safetensors"):
            return {"model": load_file(filename)}
        with open(filename, "rb") as file:
            head = file.read(1)
        # Of a ZIP archive and of a pickle, the two formats of torch.save.
        if head not in (b"P", b"\x80"):
            raise ValueError("it is not a file of torch.save")
        with torch.serialization.safe_globals(_SETTINGS):
            loaded = torch.load(filename, map_location="cpu", weights_only=True)
        if isinstance(loaded, dict) and "model" not in loaded:
            weights = loaded.get("state_dict")
            return {"model": weights} if isinstance(weights, dict) else loaded
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if not self._resuming:
            self._convert(checkpoint)
        names = len(checkpoint["model"])
        if self._resuming and any(key not in checkpoint for key in self.checkpointables):
            raise UserError(
                f"The checkpoint {self._filename} holds weights but no state of a training to "
                "resume: give it as train.init_checkpoint, without --resume."
            )
        incompatible = super()._load_model(checkpoint)
        self._weights_loaded = True
        if self._resuming and any(incompatible):
            raise self._of_another_config(self._filename)
        if incompatible is not None and names and names == len(incompatible.unexpected_keys):
            raise UserError(
                f"None of the {names} weights of the checkpoint has a name that this model knows: "
                "check that train.init_checkpoint belongs to the config."
            )
        return incompatible

    def _convert(self, checkpoint: dict[str, Any]) -> None:
        """Put the backbone of another model's file in this model's names, and fit its tables."""
        self._convert_ndarray_to_tensor(checkpoint["model"])
        source = f"The checkpoint {self._filename}"
        converted = convert_backbone(checkpoint["model"], self.model, source)
        if converted is not None:
            self._report = converted.report
            checkpoint["model"] = converted.state
            # Names are exact now; matching them by their ends would misplace heads and norms.
            checkpoint.pop("matching_heuristics", None)
            return
        weights = dict(without_parallel_prefix(checkpoint["model"]))
        resized = resize_tables(weights, self.model)
        if resized:
            checkpoint["model"] = weights | resized
            logger.info(
                "%d tables of relative positions of %s were interpolated to the model's windows.",
                sum(name.endswith("_table") for name in resized),
                self._filename,
            )

    @staticmethod
    def _of_another_config(path: str) -> UserError:
        return UserError(
            f"The checkpoint {path} does not belong to this config: start with a new "
            "train.output_dir or the old config."
        )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        if self._report is not None:
            self._log_report(self._report, incompatible.missing_keys)
            return
        shapes = list(incompatible.incorrect_shapes)
        if shapes:
            table = tabulate(shapes, headers=["weight", "in the checkpoint", "in the model"])
            logger.warning(
                "%d weights keep their initial values because their shapes differ:\n%s",
                len(shapes),
                table,
            )
        # The base class would repeat each of them in a line of its own.
        incompatible.incorrect_shapes.clear()
        skipped = {name for name, _, _ in shapes}
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in skipped]
        super()._log_incompatible_keys(incompatible)

    def _log_report(self, report: LoadReport, missing: list[str]) -> None:
        """Say what became of the weights of a file whose backbone was loaded."""
        inside = f"{report.target}." if report.target else ""
        others = [
            name for name in missing if not name.startswith(inside) and name not in report.initial
        ]
        remarks = []
        # A head is no part of the backbone of a classifier, so nobody misses it in a detector.
        parts = [part for part in report.parts if part != "head"]
        if parts:
            remarks.append(f"only the backbone is taken from the file, not {', '.join(parts)}")
        if report.random_head:
            remarks.append("the head is random and the predictions are meaningless")
        # To evaluate a detector with the weights of a backbone alone makes no sense.
        incomplete = bool(others or report.initial) and not self.checkpointables
        logger.log(
            logging.WARNING if incomplete or (parts and others) else logging.INFO,
            "%s weights of %s loaded into %s; %d other weights keep their initial values%s:\n%s",
            report.layout,
            self._filename,
            report.target or "the model",
            len(others),
            "".join(f"; {remark}" for remark in remarks),
            report.table(),
        )


def _unreadable(path: str, error: BaseException) -> str:
    """The sentence for an error of reading; PyTorch's advice to allow code is left out."""
    text = str(error)
    # Detectron2 also calls a query in the path "Unsupported", with a ValueError.
    refused = isinstance(error, pickle.UnpicklingError) and "Unsupported" in text
    if refused or "weights_only" in text or "Weights only" in text:
        return (
            f"The checkpoint {path} cannot be loaded: the file holds code or objects that are not "
            "tensors and is refused; if you trust it, open it where its authors' code is installed "
            "and save its state dict alone."
        )
    reason = (text.strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return (
        f"The checkpoint {path} cannot be loaded ({reason}): check the path and whether the file "
        "is complete."
    )
