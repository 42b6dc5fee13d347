"""Detection in single pictures: what ``demo.py`` runs, and a model for own scripts to call."""

import glob
import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import Metadata
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from detectron2.utils.visualizer import VisImage, Visualizer
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from efficient_detr.data.seeding import temporary_seed
from efficient_detr.engine.building import build_checkpointer, build_model, dataset_class_names
from efficient_detr.engine.checkpointer import stored_class_names
from efficient_detr.engine.checks import target_of
from efficient_detr.errors import UserError
from efficient_detr.files import replaced_file
from efficient_detr.modeling.classifier import ImageClassifier

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")


class Predictor:
    """A model with its weights, its test-time resizing and its class names.

    Args:
        cfg: a LazyConfig. Read are ``model``, ``train.device``, ``train.init_checkpoint``,
            ``dataloader.test.mapper`` for the augmentations (ResizeShortestEdge and the like) and
            the channel order, and ``dataloader.test.dataset`` for the class names.
        config_file: where the config is from, for errors; None if unknown.

    Raises:
        UserError: if the model is a classifier, or the weights cannot be loaded.

    Example::

        predictor = Predictor(load_config("configs/focus_detr.py", ["train.init_checkpoint=w.pth"]))
        instances = predictor(predictor.read("street.jpg"))
        instances[instances.scores > 0.5].pred_boxes
    """

    def __init__(self, cfg: DictConfig, config_file: str | None = None) -> None:
        _check_detector(cfg)
        mapper = OmegaConf.select(cfg, "dataloader.test.mapper", default={})
        self.image_format = str(mapper.get("image_format", "RGB"))
        self.augmentations = T.AugmentationList(list(instantiate(mapper.get("augmentations", []))))
        self.metadata = _metadata(cfg)
        self.model = build_model(cfg).to(torch.device(cfg.train.device)).eval()
        checkpointer = build_checkpointer(cfg, self.model, config_file)
        names = stored_class_names(checkpointer.load(cfg.train.init_checkpoint))
        # The data set itself need not be on the machine.
        if names is not None and self.metadata.get("thing_classes") is None:
            self.metadata.set(thing_classes=names)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """Detect objects in one picture.

        Args:
            image: uint8 (H, W, 3), RGB.

        Returns:
            Instances on the CPU with ``pred_boxes`` (Q, 4) in absolute (x1, y1, x2, y2) of the
            given picture, ``scores`` (Q,) and ``pred_classes`` (Q,), best first.

        Raises:
            UserError: if the picture cannot be resized, or the model cannot take its size.
        """
        height, width = image.shape[:2]
        channels = image if self.image_format == "RGB" else image[:, :, ::-1]
        resized = T.AugInput(np.ascontiguousarray(channels))
        try:
            self.augmentations(resized)
        # A side of a very long and narrow picture may shrink to nothing.
        except ValueError as error:
            raise UserError(
                f"A picture of {width} x {height} pixels cannot be resized as "
                f"dataloader.test.mapper.augmentations say: {error}"
            ) from error
        # A copy, because PyTorch warns of arrays that cannot be written to, such as Pillow's.
        tensor = torch.from_numpy(resized.image.transpose(2, 0, 1).copy())
        output = self.model([{"image": tensor, "height": height, "width": width}])[0]
        instances: Instances = output["instances"].to("cpu")
        return instances[instances.scores.argsort(descending=True, stable=True)]

    def read(self, path: str) -> np.ndarray:
        """Read a picture, upright; see :func:`read_picture`."""
        return read_picture(path)

    def draw(self, image: np.ndarray, instances: Instances) -> VisImage:
        """Draw boxes, class names and scores on a copy of a picture.

        Args:
            image: uint8 (H, W, 3), RGB.
            instances: what :meth:`__call__` returned for it, or a part of that.

        Returns:
            Detectron2's drawing; ``get_image()`` gives its pixels.
        """
        # The colours are drawn at random; equal detections shall give equal pictures.
        with temporary_seed(0):
            visualizer = Visualizer(image, self.metadata)
            drawing: VisImage = visualizer.draw_instance_predictions(instances)
        return drawing


def read_picture(path: str) -> np.ndarray:
    """Read a picture, upright.

    Args:
        path: file to read. 16-bit grey values are scaled to 8 bits.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        UserError: if the file is missing, not a picture, or has 32-bit values, whose range is
            unknown.
    """
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as picture:
            mode, file_format = picture.mode, picture.format
        if mode not in ("I", "F") and not mode.startswith("I;16"):
            return np.array(read_image(path, format="RGB"))
        pixels = read_image(path)
    # Pillow raises OSError, SyntaxError or ValueError, depending on where a file is broken.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture and is left out.") from error
    # Pillow keeps the 16 bits of these formats in 32.
    if not mode.startswith("I;16") and not (mode == "I" and file_format in ("PNG", "PPM")):
        raise UserError(f"{path} has 32 bits a value and is left out: convert it to 8 or 16 bits.")
    # Pillow would cut all values above 255 off.
    grey = np.round(pixels / 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def picture_files(inputs: Sequence[str]) -> list[str]:
    """Resolve files, folders and glob patterns.

    Args:
        inputs: what the user gave. Of a folder, all files that look like pictures are taken.

    Returns:
        Paths in the given order, sorted within a folder or pattern, each once. A plain path is kept
        even if there is no such file, so that it is reported like any unreadable one.

    Raises:
        UserError: if a folder or pattern gives nothing.
    """
    files: dict[str, None] = {}
    for entry in inputs:
        if os.path.isdir(entry):
            found = [os.path.join(entry, name) for name in sorted(os.listdir(entry))]
            found = [path for path in found if path.lower().endswith(PICTURE_ENDINGS)]
        elif glob.has_magic(entry) and not os.path.exists(entry):
            found = sorted(glob.glob(os.path.expanduser(entry), recursive=True))
        else:
            found = [os.path.expanduser(entry)]
        if not found or "" in found:
            raise UserError(
                f"--input {entry or repr(entry)} names no picture: check the folder or pattern."
            )
        files.update(dict.fromkeys(found))
    return list(files)


def output_paths(files: Sequence[str], folder: str) -> list[str]:
    """Where the drawing of each picture goes.

    Args:
        files: pictures.
        folder: output folder, made if missing.

    Returns:
        Paths in ``folder`` with the pictures' names; equal names from several folders get a number.
        Endings that the drawing library cannot write become ``.png``.

    Raises:
        UserError: if ``folder`` is a file or cannot be made, or an output would replace its own
            input.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"--output {folder} is a file: give a folder.") from error
    except OSError as error:
        raise UserError(
            f"--output {folder} cannot be made ({error.strerror or error}): give a folder that you "
            "may write to."
        ) from error
    paths: list[str] = []
    for file in files:
        stem, ending = os.path.splitext(os.path.basename(file))
        ending = ending if ending.lower() in (".jpg", ".jpeg", ".png") else ".png"
        path, number = os.path.join(folder, stem + ending), 1
        while path in paths:
            number += 1
            path = os.path.join(folder, f"{stem}_{number}{ending}")
        if os.path.realpath(path) == os.path.realpath(file):
            raise UserError(f"The result would replace {file}: choose another --output folder.")
        paths.append(path)
    return paths


def save_picture(drawing: VisImage, path: str) -> None:
    """Save a drawing under a temporary name and rename it, so that no half picture is left.

    Args:
        drawing: what :meth:`Predictor.draw` returned.
        path: file to write; its ending decides the format.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        with replaced_file(path) as partial_path:
            drawing.save(str(partial_path))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def _check_detector(cfg: DictConfig) -> None:
    """Refuse a classifier before it is built."""
    target = target_of(cfg.model)
    if cfg.get("preprocessing") is not None or (
        isinstance(target, type) and issubclass(target, ImageClassifier)
    ):
        raise UserError(
            "The config is of a classifier, which finds no objects: choose a detector, or classify "
            "pictures with tools/classify.py."
        )


def _metadata(cfg: DictConfig) -> Metadata:
    """Class names of the config's test set, under no name, so that nothing else sees them."""
    metadata = Metadata()
    classes = dataset_class_names(cfg, "test")
    if classes is not None:
        metadata.set(thing_classes=classes)
    return metadata
