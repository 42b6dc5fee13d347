"""Labels of single pictures: what ``tools/classify.py`` runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from efficient_detr.engine.building import build_checkpointer, build_model
from efficient_detr.errors import UserError
from efficient_detr.modeling.classifier import ImageClassifier


class PictureClassifier:
    """A classifier with its weights and the resizing that it was evaluated with.

    Args:
        cfg: a LazyConfig such as those of ``configs/backbones``. Read are ``model``,
            ``preprocessing``, ``train.device`` and ``train.init_checkpoint``.
        config_file: where the config is from, for errors; None if unknown.

    Raises:
        UserError: if the config is not of a classifier, or the weights cannot be loaded.
    """

    def __init__(self, cfg: DictConfig, config_file: str | None = None) -> None:
        if OmegaConf.select(cfg, "preprocessing") is None:
            raise UserError(
                "The config has no preprocessing, so it is not of a classifier: choose one of "
                "configs/backbones."
            )
        self.preprocessing = instantiate(cfg.preprocessing)
        model = build_model(cfg)
        if not isinstance(model, ImageClassifier):
            raise UserError(
                f"The config's model is a {type(model).__name__}, not a classifier: choose one of "
                "configs/backbones."
            )
        self.model = model.to(torch.device(cfg.train.device)).eval()
        build_checkpointer(cfg, self.model, config_file).load(cfg.train.init_checkpoint)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Tensor:
        """Classify one picture.

        Args:
            image: uint8 (H, W, 3), RGB.

        Returns:
            (K,) probabilities of the classes, on the CPU.

        Raises:
            UserError: if the picture cannot be resized, or the model cannot take the result.
        """
        square = self.preprocessing(image)
        if self.model.input_format != "RGB":
            square = square[:, :, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))
        try:
            (result,) = self.model([{"image": tensor}])
        # A map that is smaller than a convolution's kernel.
        except ValueError as error:
            height, width = square.shape[:2]
            raise UserError(
                f"The model cannot take images of {width} x {height} pixels "
                f"(preprocessing.image_size): {error}"
            ) from error
        return result["probabilities"].cpu()


def read_class_names(path: str, num_classes: int) -> list[str]:
    """Names of a model's classes.

    Args:
        path: a text file with one name a line, or a ``.json`` file with a list of names; in the
            order of the model's outputs.
        num_classes: how many names there must be.

    Raises:
        UserError: if the file cannot be read or holds another number of names.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"--classes {path} cannot be read: {reason}.") from error
    names = _names_in_json(path, text) if path.lower().endswith(".json") else text.splitlines()
    names = [name.strip() for name in names]
    while names and not names[-1]:  # empty lines at the end
        names.pop()
    if len(names) != num_classes:
        raise UserError(
            f"--classes {os.path.basename(path)} holds {len(names)} names, but the model has "
            f"{num_classes} classes: give one name for each, in the order of the model's outputs."
        )
    return names


def _names_in_json(path: str, text: str) -> Sequence[str]:
    try:
        names = json.loads(text)
    except ValueError as error:
        raise UserError(f"--classes {path} is not valid JSON: {error}.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'--classes {path} must hold a list of names: ["tench", "goldfish", ...].')
    return names
