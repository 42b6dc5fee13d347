"""Checkpoints that are complete or absent, and loading that is complete or refused."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from tabulate import tabulate
from torch import Tensor, nn

from efficient_detr.checkpoint.convert import (
    Conversion,
    clean_weights,
    convert_backbone_of_file,
    convert_checkpoint,
)
from efficient_detr.checkpoint.downloads import (
    download,
    is_address,
    parse_address,
    read_download,
)
from efficient_detr.checkpoint.files import (
    READ_ERRORS,
    read_checkpoint,
    unreadable,
)
from efficient_detr.checkpoint.formats import recognize_format
from efficient_detr.checkpoint.report import ConversionReport
from efficient_detr.errors import UserError
from efficient_detr.files import replaced_file

logger = logging.getLogger(__name__)

CLASS_NAMES = "class_names"
"""Entry of our files with the names of the model's classes."""

_PARTIAL = ".partial"
_MATCHING_QUERY = "?matching_heuristics=True"


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes, safe reads and published formats.

    A checkpoint is written beside its final name and renamed when it is complete, so a run that is
    killed while it saves leaves the previous checkpoint usable. No file can run code when it is
    read: neither ``.pth`` nor ``.pkl`` nor ``.safetensors``.

    Files in published formats are converted when they are loaded, and nothing is loaded before the
    whole file is known to fit. Of other detectors with a known backbone that alone is loaded if
    `allow_partial` is set. A table says what became of the weights.

    Args:
        model: the model; it may be wrapped for distributed training.
        save_dir: folder of the checkpoints.
        model_name: what errors call the model, such as the path of its config.
        class_names: of the model's classes, in order; None if unknown. They are saved, and compared
            with those of a file that is loaded.
        allow_partial: load what fits of a file instead of refusing it.
        **checkpointables: what is saved with the model: the state of a training. Only where there
            is any, weights that depend on the number of classes or queries may stay initial.
    """

    # True while `resume` loads, which takes only a file that fits the model completely.
    _resuming = False
    # True from the moment the weights are in the model; what follows are the checkpointables.
    _weights_loaded = False
    # The file as the user named it, and whether it was downloaded.
    _name = ""
    _downloaded = False
    # Whether Detectron2 is asked to match weights by the ends of their names.
    _matching = False
    # Set where weights were converted.
    _conversion: Conversion | None = None

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        model_name: str = "the model",
        class_names: Sequence[str] | None = None,
        allow_partial: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.model_name = model_name
        self.class_names = None if class_names is None else list(class_names)
        self.allow_partial = allow_partial

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, the names of its classes and the checkpointables.

        Args:
            name: file name without ``.pth``, in ``save_dir``.
            **kwargs: further entries of the file.
        """
        names = {} if self.class_names is None else {CLASS_NAMES: self.class_names}
        super().save(name + _PARTIAL, **names, **kwargs)

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
        """Load a file of ours or in a published format.

        Args:
            path: a file, or its address as `parse_address` takes it; '' loads nothing, with a
                warning if there is nothing to train.
            checkpointables: names of those to load, None for all.
            **kwargs: further arguments of the base class.

        Returns:
            The entries of the file that are not loaded into anything.

        Raises:
            UserError: if the file is missing, damaged, holds code or does not fit the model. The
                model is then as it was.
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
        self._conversion = None
        self._name = path
        try:
            loaded: dict[str, Any] = super().load(self._local(path), checkpointables, **kwargs)
            return loaded
        except UserError:
            raise
        except READ_ERRORS as error:
            if self._resuming and self._weights_loaded:
                raise self._of_another_config() from error
            raise unreadable(path, error) from error
        finally:
            # Detectron2 leaves it set when loading fails, and then refuses every further load.
            self._parsed_url_during_load = None

    def _local(self, path: str) -> str:
        """The file behind a path or an address."""
        self._downloaded = is_address(path)
        if self._downloaded:
            address = parse_address(path)
            self._matching = address.matching
            return download(address)
        self._matching = path.endswith(_MATCHING_QUERY)
        return path.removesuffix(_MATCHING_QUERY)

    def _load_file(self, filename: str) -> dict[str, Any]:
        read = read_download if self._downloaded else read_checkpoint
        loaded = read(filename, self._name)
        if self._matching:
            loaded["matching_heuristics"] = True
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self._resuming:
            self._check_resumable(checkpoint)
        else:
            self._convert(checkpoint)
        names = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        self._weights_loaded = True
        if incompatible is not None and names == len(incompatible.unexpected_keys):
            raise UserError(
                f"None of the {names} weights of the checkpoint {self._name} has a name that "
                f"{self.model_name} knows: check that train.init_checkpoint belongs to the config."
            )
        return incompatible

    def _check_resumable(self, checkpoint: dict[str, Any]) -> None:
        if any(key not in checkpoint for key in self.checkpointables):
            raise UserError(
                f"The checkpoint {self._name} holds weights but no state of a training to "
                "resume: give it as train.init_checkpoint, without --resume."
            )
        if _shapes(checkpoint["model"]) != _shapes(self.model.state_dict()):
            raise self._of_another_config()

    def _convert(self, checkpoint: dict[str, Any]) -> None:
        """Give the weights of a file the names and shapes of the model, or leave them if they have.

        Raises:
            UserError: if that is not possible.
        """
        stored = checkpoint["model"]
        weights, _ = clean_weights(stored)
        names = stored_class_names(checkpoint)
        ours = _shapes(self.model.state_dict())
        self._warn_of_other_classes(names)
        checkpoint["model"] = weights
        same_classes = self.class_names is None or names == self.class_names
        # Whatever an evaluation makes of them, it does without knowing what they were.
        same_classes |= names is None and not self.checkpointables
        if same_classes and _shapes(weights) == ours:
            checkpoint.pop("matching_heuristics", None)
            return
        self._conversion = self._converted(checkpoint, stored, names)
        if self._conversion is not None:
            checkpoint["model"] = self._conversion.state
            # Names are exact now; matching them by their ends would misplace heads and norms.
            checkpoint.pop("matching_heuristics", None)

    def _converted(
        self, checkpoint: Mapping[str, Any], stored: Mapping[str, Tensor], names: list[str] | None
    ) -> Conversion | None:
        """The weights of a file for the model; None for files that Detectron2 itself knows."""
        source = f"The checkpoint {self._name}"
        weights = checkpoint["model"]
        of_zoo = checkpoint.get("matching_heuristics") or "__author__" in checkpoint
        if of_zoo and recognize_format(weights) is None:
            # In Detectron2's model zoo things may be missing, and names are other ones.
            return convert_backbone_of_file(
                weights,
                self.model,
                allow_partial=self.allow_partial,
                source=source,
                target=self.model_name,
            )
        return convert_checkpoint(
            stored,
            model=self.model,
            class_names=self.class_names,
            source_class_names=names,
            fresh_heads=bool(self.checkpointables),
            allow_partial=self.allow_partial,
            source=source,
            target=self.model_name,
        )

    def _warn_of_other_classes(self, names: list[str] | None) -> None:
        """Say that predictions will be called by names that they were not trained for."""
        if self.checkpointables or names is None or self.class_names is None:
            return
        strange = sorted(set(self.class_names) - set(names))
        if strange and len(names) == len(self.class_names):
            logger.warning(
                "%s was trained on other classes: it knows no %s, so the results of the data set "
                "are wrong.",
                self._name,
                ", ".join(strange[:5]),
            )

    def _of_another_config(self) -> UserError:
        return UserError(
            f"The checkpoint {self._name} does not belong to this config: start with a new "
            "train.output_dir or the old config."
        )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        if self._conversion is not None:
            report = self._conversion.report
            if self._conversion.format is None:
                self._log_backbone(report, incompatible.missing_keys)
            else:
                self._log_model(report)
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

    def _log_model(self, report: ConversionReport) -> None:
        """Say what became of the weights of a file that is for the whole model."""
        remarks = []
        if report.initial:
            remarks.append(f"{len(report.initial)} weights keep their initial values")
        if report.unexpected:
            remarks.append(f"{len(report.unexpected)} weights of the file have no place in it")
        logger.log(
            logging.WARNING if remarks and self.allow_partial else logging.INFO,
            "%s (%s) loaded into %s%s:\n%s",
            self._name,
            report.layout,
            self.model_name,
            "".join(f"; {remark}" for remark in remarks),
            report.table(),
        )

    def _log_backbone(self, report: ConversionReport, missing: list[str]) -> None:
        """Say what became of the weights of a file whose backbone was loaded."""
        inside = f"{report.target}." if report.target else ""
        others = [name for name in missing if not name.startswith(inside)]
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
            self._name,
            report.target or self.model_name,
            len(others),
            "".join(f"; {remark}" for remark in remarks),
            report.table(),
        )


def stored_class_names(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes of a file of ours; None if it does not tell.

    Args:
        checkpoint: the entries of the file.
    """
    names = checkpoint.get(CLASS_NAMES)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return None
    return list(names)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
