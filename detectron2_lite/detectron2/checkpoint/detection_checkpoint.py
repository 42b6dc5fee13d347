"""Saving and loading models and the state of a training."""

import logging
import pickle
from typing import Any

import torch
from detectron2._absent import absence_message
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import Checkpointer
from torch import nn

# All that a pickled dictionary of arrays refers to (numpy.core is the old name of numpy._core).
_PICKLE_NAMES = {"collections.OrderedDict", "_codecs.encode", "numpy.dtype", "numpy.ndarray"}
_PICKLE_NAMES |= {"numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries of numpy arrays and refuses whatever could run code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        if f"{module}.{name}" not in _PICKLE_NAMES:
            message = f"The .pkl checkpoint holds {module}.{name}, which may run code: not loaded."
            raise pickle.UnpicklingError(message)
        return super().find_class(module, name)


class DetectionCheckpointer(Checkpointer):
    """fvcore's checkpointer, which writes on the main process only.

    It reads ``.pth`` files, bare state dicts included, and the ``.pkl`` files of the model zoo,
    without running code in them. If a file says ``matching_heuristics``, as those of the zoo do, or
    its path ends in "?matching_heuristics=True", weights are matched by the ends of their names.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        self._matches_suffixes = False
        options = {"save_to_disk": comm.is_main_process(), **checkpointables}
        super().__init__(model, save_dir, **options)
        self.path_manager = PathManager

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        path, _, query = path.partition("?")
        if query not in ("", "matching_heuristics=True"):
            raise ValueError(f"{path} is followed by a query of unknown meaning: {query}")
        self._matches_suffixes = query != ""
        return super().load(path, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith(".pkl"):
            loaded = self._torch_load(filename)
            return loaded if "model" in loaded else {"model": loaded}
        with open(filename, "rb") as file:
            loaded = _ArrayUnpickler(file, encoding="latin1").load()
        if "model" not in loaded or "__author__" not in loaded:
            raise ValueError(absence_message(f"Reading the Caffe2 weights in {filename}"))
        return loaded

    def _torch_load(self, filename: str) -> dict[str, Any]:
        return torch.load(filename, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self._matches_suffixes or checkpoint.get("matching_heuristics", False):
            checkpoint["model"] = _match_by_suffix(self.model.state_dict(), checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        # Normalisation comes from the config, so its absence from old files needs no warning.
        known = {"pixel_mean", "pixel_std"} & dict(self.model.named_buffers()).keys()
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in known]
        return incompatible


def _match_by_suffix(model_state: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """Renames each weight to the name in the model that ends in its own, the longest match first.

    ValueError if a weight is the best match of two names; weights that fit nowhere stay.
    """
    logger = logging.getLogger(__name__)
    taken: dict[str, str] = {}
    for name in sorted(model_state):
        parts = name.split(".")
        suffixes = (".".join(parts[start:]) for start in range(len(parts)))
        key = next((suffix for suffix in suffixes if suffix in weights), None)
        if key is not None and weights[key].shape != model_state[name].shape:
            logger.warning("%s is not loaded into %s: their shapes differ.", key, name)
        elif key in taken:
            raise ValueError(f"{key} of the checkpoint fits both {taken[key]} and {name}.")
        elif key is not None:
            taken[key] = name
    logger.info("%d of %d weights matched by the ends of their names", len(taken), len(weights))
    return {taken.get(key, key): value for key, value in weights.items()}
