"""The quickstart data set: generated once, then read like any data set in COCO format.

    <root>/quickstart_digits/
        train/000001.jpg ...        pictures with digits of the training split
        val/000001.jpg ...          pictures with the other digits
        instances_train.json        COCO annotations; categories "0" to "9" have ids 1 to 10
        instances_val.json
        generator.json              what the folder was generated from

`<root>` is `$DETECTRON2_DATASETS`, or `datasets` in the working folder. The pictures are drawn by
`efficient_detr.data.digit_images`; equal settings give equal bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from numpy.typing import NDArray

from efficient_detr.data import digit_images
from efficient_detr.data.digit_images import (
    DigitPictureSettings,
    GlyphSource,
    PlacedDigit,
    draw_digit_picture,
)
from efficient_detr.errors import UserError

__all__ = ["DigitsSettings", "default_root", "generate_digits", "register_digits", "split_digits"]

logger = logging.getLogger(__name__)

FOLDER_NAME = "quickstart_digits"
CLASS_NAMES = [str(digit) for digit in range(10)]
SPLITS = ("train", "val")

_RECORD_NAME = "generator.json"
_JPEG_QUALITY = 93

Progress = Callable[[int, int], None]  # (pictures done, pictures in total)


@dataclass(frozen=True, kw_only=True)
class DigitsSettings:
    """What the data set is generated from.

    Attributes:
        train_images: number of training pictures, at least 1.
        val_images: number of validation pictures, at least 1.
        train_digits: number of scans, of 1,797, that only training pictures show; validation
            pictures show the others.
        seed: start of every random choice, 0 or larger.
        picture: what the pictures look like.
    """

    train_images: int = 3200
    val_images: int = 200
    train_digits: int = 1400
    seed: int = 0
    picture: DigitPictureSettings = field(default_factory=DigitPictureSettings)

    def __post_init__(self) -> None:
        for name in ("train_images", "val_images", "train_digits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or larger, got {self.seed}.")


def default_root() -> Path:
    """Return Detectron2's folder of data sets: `$DETECTRON2_DATASETS`, or `datasets`."""
    return Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS") or "datasets"))


def split_digits(total: int, train_digits: int) -> dict[str, list[int]]:
    """Split the scans between the training and the validation pictures.

    The split does not depend on the seed of the pictures: a scan that one data set trains on is
    never validated on by another one with the same `train_digits`.

    Args:
        total: number of scans.
        train_digits: number of scans for training, 1 to `total` - 1.

    Returns:
        Ascending scan indices under "train" and "val"; disjoint, together all of them.

    Raises:
        ValueError: a split would be empty.
    """
    if not 0 < train_digits < total:
        raise ValueError(f"train_digits must be from 1 to {total - 1}, got {train_digits}.")
    order = np.random.default_rng(1797).permutation(total)
    train, val = order[:train_digits], order[train_digits:]
    return {"train": sorted(train.tolist()), "val": sorted(val.tolist())}


def generate_digits(
    root: str | os.PathLike[str] | None = None,
    settings: DigitsSettings | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Generate the data set, unless the folder already holds it.

    The pictures are written to a temporary folder that is renamed when complete. Of several
    processes, one generates while the others wait. A folder that was generated with other
    settings, or by another version of the generator, is replaced.

    Args:
        root: folder of data sets; `default_root()` if None.
        settings: what to generate; the defaults if None.
        progress: called after every picture with the number of pictures done and in total.

    Returns:
        The data set's folder, `<root>/quickstart_digits`.

    Raises:
        UserError: the folder exists and was not written by this generator, or scikit-learn, whose
            digits are drawn, is not installed.
    """
    root = Path(default_root() if root is None else root)
    settings = settings or DigitsSettings()
    folder = root / FOLDER_NAME
    record = _generator_record(settings)
    if _is_current(folder, record):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with file_lock(str(root / f".{FOLDER_NAME}")):
        if not _is_current(folder, record):
            _check_replaceable(folder)
            logger.info("Generating %d pictures of digits in %s.", _total(settings), folder)
            _generate_and_rename(folder, settings, record, progress)
    return folder


def _total(settings: DigitsSettings) -> int:
    return settings.train_images + settings.val_images


def _generator_record(settings: DigitsSettings) -> dict[str, Any]:
    """Return what decides about the pictures: the settings and a digest of the generator."""
    digest = hashlib.sha256()
    for source in (__file__, digit_images.__file__):
        digest.update(Path(source).read_bytes())
    record = {"settings": dataclasses.asdict(settings), "generator": digest.hexdigest()}
    return json.loads(json.dumps(record))  # tuples become lists, as they do in the file


def _is_current(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a folder was generated from the same record."""
    try:
        return json.loads((folder / _RECORD_NAME).read_text()) == record
    except (OSError, ValueError):
        return False


def _check_replaceable(folder: Path) -> None:
    """Raise UserError if a folder holds something that this generator did not write."""
    if folder.exists() and not (folder / _RECORD_NAME).is_file():
        raise UserError(
            f"{folder} exists but was not written by the digit generator "
            f"(it holds no {_RECORD_NAME}): move it away or set DETECTRON2_DATASETS elsewhere."
        )


def _generate_and_rename(
    folder: Path, settings: DigitsSettings, record: dict[str, Any], progress: Progress | None
) -> None:
    """Write the data set beside its folder and moves it into place when it is complete."""
    workspace = Path(tempfile.mkdtemp(prefix=f".{FOLDER_NAME}.", dir=folder.parent))
    try:
        new = workspace / "new"
        new.mkdir()
        _write_data_set(new, settings, progress)
        (new / _RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
        if folder.exists():
            folder.rename(workspace / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _load_scans() -> tuple[Any, list[NDArray[np.uint8]]]:
    """Return scikit-learn's digits (`images`, `target`) and photographs."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise UserError(
            "The quickstart digits are drawn from scikit-learn's scans: pip install scikit-learn."
        ) from error
    return load_digits(), load_sample_images().images


def _write_data_set(folder: Path, settings: DigitsSettings, progress: Progress | None) -> None:
    """Write the pictures and annotations of both splits."""
    scans, photos = _load_scans()
    indices = split_digits(len(scans.target), settings.train_digits)
    counts = {"train": settings.train_images, "val": settings.val_images}
    done = 0
    for number, split in enumerate(SPLITS):
        glyphs = GlyphSource(scans=scans.images, values=scans.target, indices=indices[split])
        (folder / split).mkdir()
        pictures = []
        for image_id in range(1, counts[split] + 1):
            # One random stream per picture: a picture does not depend on how many precede it.
            generator = np.random.default_rng([settings.seed, number, image_id])
            image, digits = draw_digit_picture(generator, glyphs, photos, settings.picture)
            _write_image(folder / split / _file_name(image_id), image)
            pictures.append((image.shape[0], image.shape[1], digits))
            done += 1
            if progress is not None:
                progress(done, _total(settings))
        annotations = json.dumps(_coco_annotations(pictures))
        (folder / f"instances_{split}.json").write_text(annotations)


def _file_name(image_id: int) -> str:
    return f"{image_id:06d}.jpg"


def _write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an RGB image as JPEG."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    encoded, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not encoded:
        raise OSError(f"OpenCV could not encode the picture {path}.")
    path.write_bytes(data.tobytes())


def _coco_annotations(pictures: Sequence[tuple[int, int, list[PlacedDigit]]]) -> dict[str, Any]:
    """Return COCO annotations of pictures (height, width, digits); image ids start at 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (height, width, digits) in enumerate(pictures, start=1):
        name = _file_name(image_id)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for digit in digits:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": digit.value + 1,
                    "bbox": list(digit.box),
                    "area": digit.box[2] * digit.box[3],
                    "iscrowd": 0,
                    "scan_index": digit.scan_index,
                }
            )
    categories = [
        {"id": value + 1, "name": name, "supercategory": "digit"}
        for value, name in enumerate(CLASS_NAMES)
    ]
    description = "Handwritten digits composed into small detection pictures"
    return {
        "info": {"description": description},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def register_digits(
    root: str | os.PathLike[str] | None = None,
    settings: DigitsSettings | None = None,
    *,
    name: str = FOLDER_NAME,
) -> tuple[str, str]:
    """Register the data set in Detectron2's catalogs; it is generated when it is first read.

    Registering the same data set again changes nothing. The metadata name the JSON file and the
    image folder (`json_file`, `image_root`) once the data set has been read.

    Args:
        root: folder of data sets; `default_root()` if None.
        settings: what to generate; the defaults if None.
        name: start of the registered names.

    Returns:
        The registered names, `<name>_train` and `<name>_val`.

    Raises:
        UserError: the names are registered with another folder or other settings.
    """
    root = Path(default_root() if root is None else root)
    settings = settings or DigitsSettings()
    train_name, val_name = (_register_split(root, settings, name, split) for split in SPLITS)
    return train_name, val_name


def _register_split(root: Path, settings: DigitsSettings, name: str, split: str) -> str:
    """Register one split and returns its name."""
    full_name = f"{name}_{split}"
    loader = functools.partial(_load_split, root, settings, full_name, split)
    if full_name in DatasetCatalog:
        known = DatasetCatalog[full_name]
        if not isinstance(known, functools.partial) or known.args != loader.args:
            raise UserError(
                f"The data set name {full_name!r} is taken by a data set with another folder or "
                "other settings: pass another name."
            )
        return full_name
    DatasetCatalog.register(full_name, loader)
    MetadataCatalog.get(full_name).set(
        evaluator_type="coco",
        thing_classes=CLASS_NAMES,
        thing_dataset_id_to_contiguous_id={value + 1: value for value in range(10)},
    )
    return full_name


def _load_split(
    root: Path, settings: DigitsSettings, full_name: str, split: str
) -> list[dict[str, Any]]:
    """Generate the data set if need be and returns Detectron2's dicts of one split."""
    folder = generate_digits(root, settings)
    json_file, image_root = str(folder / f"instances_{split}.json"), str(folder / split)
    # Only now, because metadata must never name files that are still to be generated.
    MetadataCatalog.get(full_name).set(json_file=json_file, image_root=image_root)
    return load_coco_json(json_file, image_root, full_name)
