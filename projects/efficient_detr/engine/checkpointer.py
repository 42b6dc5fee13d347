"""Checkpoints that are complete or absent, and loading that says what did not fit."""

import logging
import os
import pickle
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from tabulate import tabulate

from efficient_detr.errors import UserError

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes, safe reads and a table of skipped weights.

    A checkpoint is written beside its final name and renamed when it is complete, so a run that is
    killed while it saves leaves the previous checkpoint usable.
    """

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
        tag = os.path.join(self.save_dir, "last_checkpoint")
        with open(tag + _PARTIAL, "w", encoding="utf-8") as file:
            file.write(final)
        os.replace(tag + _PARTIAL, tag)

    def load(
        self, path: str, checkpointables: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Load a file; see Detectron2's ``DetectionCheckpointer.load``.

        Raises:
            UserError: if the file is missing, damaged or fits no weight of the model.
        """
        if not path:
            logger.info("No checkpoint given: the model starts from its initial weights.")
            return {}
        try:
            return super().load(path, checkpointables, **kwargs)
        except UserError:
            raise
        except (OSError, EOFError, RuntimeError, AssertionError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"The checkpoint {path} cannot be loaded ({reason}): check the path and whether "
                "the file is complete."
            ) from error
        finally:
            # Detectron2 leaves it set when loading fails, and then refuses every further load.
            self._parsed_url_during_load = None

    def _torch_load(self, filename: str) -> Any:
        return torch.load(filename, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        names = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        if incompatible is not None and names and names == len(incompatible.unexpected_keys):
            raise UserError(
                f"None of the {names} weights of the checkpoint has a name that this model knows: "
                "check that train.init_checkpoint belongs to the config."
            )
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
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
