"""Data sets by name or by file: COCO-format JSON plus a folder of images."""

import difflib
import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from efficient_detr.errors import UserError

logger = logging.getLogger(__name__)

# What each annotation needs, and how to mend it. COCO's evaluation reads all of them.
_HOW_TO_MEND = {
    "id": "give each annotation a number of its own",
    "image_id": "give the 'id' of one of the file's 'images'",
    "category_id": "give the 'id' of one of the file's 'categories'",
    "bbox": "give four finite numbers, [x, y, width, height]",
    "area": 'add "area": width * height',
    "iscrowd": 'add "iscrowd": 0',
}
# Annotation files that were found sound, with time and size; reading one of COCO takes seconds.
_sound_files: set[tuple[str, int, int]] = set()


def register_coco(name: str, *, json_file: str, image_root: str) -> None:
    """Register a COCO-format data set under a name; registering it again changes nothing.

    Args:
        name: a new name for Detectron2's ``DatasetCatalog``.
        json_file: annotation file in COCO's instances format.
        image_root: folder that the ``file_name`` entries of the JSON file are relative to.

    Raises:
        UserError: if the name already belongs to other files.
    """
    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, json_file, image_root)
        return
    metadata = MetadataCatalog.get(name)
    known = (metadata.get("json_file"), metadata.get("image_root"))
    if known != (json_file, image_root):
        raise UserError(
            f"The data set name '{name}' already stands for {known[0]}: give {json_file} "
            "a name of its own with dataset.names=NAME."
        )


def detection_dataset(
    names: str | Sequence[str],
    *,
    json_file: str | None = None,
    image_root: str | None = None,
    filter_empty: bool = True,
) -> list[dict[str, Any]]:
    """Load the records of registered data sets, or of a COCO file that is registered on the way.

    Made for configs. On the command line, own data is two overrides and a name::

        dataloader.train.dataset.names=cells_train
        dataloader.train.dataset.json_file=cells/annotations/train.json
        dataloader.train.dataset.image_root=cells/train

    Args:
        names: one name or several names of Detectron2's ``DatasetCatalog``.
        json_file: COCO-format annotations to register under the one name in ``names``.
        image_root: image folder that belongs to ``json_file``.
        filter_empty: drop images without any box that is not a crowd region (for training).

    Returns:
        Records in Detectron2's dataset format; ``thing_classes`` is then set in the metadata.

    Raises:
        UserError: for an unknown name, missing files, unreadable JSON, incomplete annotations or
            category ids that the file itself does not define.
    """
    names = [names] if isinstance(names, str) else list(names)
    register_files(names, json_file, image_root)
    for name in names:
        check_dataset_files(name)
        # Of several processes, the one that started them has checked.
        if comm.get_world_size() == 1:
            check_annotations(name)
    try:
        records = get_detection_dataset_dicts(names, filter_empty, check_consistency=False)
    except (AssertionError, KeyError, TypeError, ValueError, OSError) as error:
        files = ", ".join(str(MetadataCatalog.get(name).get("json_file", name)) for name in names)
        reason = " ".join(str(error).strip("'\"").split()) or type(error).__name__
        raise UserError(
            f"The data set {_quoted(names)} ({files}) cannot be loaded: {reason}"
        ) from error
    _check_consistency(names, records)
    return records


def register_files(names: Sequence[str], json_file: str | None, image_root: str | None) -> None:
    """Register ``json_file`` and ``image_root``, if given, under the single name in ``names``.

    Raises:
        UserError: if only one of the two paths is given, or several names.
    """
    if json_file is None and image_root is None:
        return
    if json_file is None or image_root is None:
        raise UserError(
            f"The data set {_quoted(names)} needs both paths: set dataset.json_file and "
            "dataset.image_root."
        )
    if len(names) != 1:
        raise UserError(f"{json_file} needs exactly one data set name, not {_quoted(names)}.")
    register_coco(names[0], json_file=json_file, image_root=image_root)


def check_dataset_files(name: str) -> None:
    """Check that a data set is registered and that its files are there, without reading them.

    Raises:
        UserError: naming the unknown name with close ones, or the missing path.
    """
    if name not in DatasetCatalog.list():
        raise UserError(f"There is no data set '{name}'{_suggestion(name, DatasetCatalog.list())}")
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if json_file is not None and "://" not in json_file and not os.path.isfile(json_file):
        raise UserError(_missing_path(name, "annotation file", json_file))
    if image_root is not None and "://" not in image_root and not os.path.isdir(image_root):
        raise UserError(_missing_path(name, "image folder", image_root))


def check_annotations(name: str) -> None:
    """Check the JSON file of a data set in COCO format; a file that was found sound is not reread.

    Detectron2 trains with some incomplete annotations and fails in the evaluation at the end. Data
    sets of other formats, and files that are not on the disk, are left to whoever loads them.

    Args:
        name: a registered data set.

    Raises:
        UserError: naming the file, the image or annotation, what is wrong and how to mend it.
    """
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file")
    if metadata.get("evaluator_type") != "coco" or path is None or not os.path.isfile(path):
        return
    status = os.stat(path)
    state = (os.path.realpath(path), status.st_mtime_ns, status.st_size)
    if state in _sound_files:
        return
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        images = [image["id"] for image in content["images"]]
        categories = [category["id"] for category in content["categories"]]
        _check_unique(path, "images", images)
        _check_unique(path, "categories", categories)
        annotations = content.get("annotations", [])
        known = set(categories)
        for number, annotation in enumerate(annotations):
            wrong = _wrong_key(annotation, known)
            if wrong is not None:
                raise UserError(_broken_annotation(path, number, annotation, wrong))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} of the data set '{name}' cannot be loaded, because it is not in COCO format "
            f"({error!r}): it needs 'images', 'annotations' and 'categories'."
        ) from error
    _sound_files.add(state)


def _check_unique(path: str, part: str, ids: list[Any]) -> None:
    seen = set()
    for one in ids:
        if one in seen:
            raise UserError(
                f"{path} has several '{part}' with the id {one}: give each an id of its own."
            )
        seen.add(one)


def _wrong_key(annotation: dict[str, Any], categories: set[Any]) -> str | None:
    """The first key that is missing or has an impossible value."""
    for key in ("id", "image_id"):
        if annotation.get(key) is None:
            return key
    if annotation.get("category_id") not in categories:
        return "category_id"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        return "bbox"
    if not _is_finite(annotation.get("area")):
        return "area"
    return None if annotation.get("iscrowd") in (0, 1) else "iscrowd"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _broken_annotation(path: str, number: int, annotation: dict[str, Any], key: str) -> str:
    which = f"Annotation {annotation['id']}" if key != "id" else f"Annotation number {number + 1}"
    fault = f"has the {key} {json.dumps(annotation[key])}" if key in annotation else f"lacks {key}"
    return f"{which} (image {annotation.get('image_id')}) in {path} {fault}: {_HOW_TO_MEND[key]}."


def class_names(name: str) -> list[str] | None:
    """Class names of a data set, in the order of the model's class indices.

    Reads the ``categories`` of the JSON file if the data set has not been loaded yet.

    Returns:
        The names, or None if the data set does not tell.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is not None:
        return list(metadata.thing_classes)
    json_file = metadata.get("json_file")
    if json_file is None or not os.path.isfile(json_file):
        return None
    try:
        with open(json_file, encoding="utf-8") as file:
            categories = json.load(file)["categories"]
        return [c["name"] for c in sorted(categories, key=_category_id)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{json_file} of the data set '{name}' is not in COCO format ({error!r}): it needs "
            "'images', 'annotations' and 'categories'."
        ) from error


def _category_id(category: dict[str, Any]) -> int:
    return int(category["id"])


def _check_consistency(names: Sequence[str], records: list[dict[str, Any]]) -> None:
    """Equal classes in all data sets, category ids in range; logs the class histogram."""
    if not records:
        raise UserError(
            f"The data set {_quoted(names)} has no image with a box: check its annotations, or "
            "keep empty images with dataset.filter_empty=False."
        )
    classes = class_names(names[0])
    if classes is None or "annotations" not in records[0]:
        return
    for name in names[1:]:
        if class_names(name) != classes:
            raise UserError(
                f"The data sets '{names[0]}' and '{name}' have different classes, so they cannot "
                "be trained together: give both the same 'categories'."
            )
    for record in records:
        _check_category_ids(record, len(classes), names)
    print_instances_class_histogram(records, classes)


def _check_category_ids(record: dict[str, Any], num_classes: int, names: Sequence[str]) -> None:
    for annotation in record["annotations"]:
        if not 0 <= annotation["category_id"] < num_classes:
            raise UserError(
                f"Image {record.get('image_id')} ({record.get('file_name')}) of the data set "
                f"{_quoted(names)} has category id {annotation['category_id']}, but the ids must "
                f"lie in 0..{num_classes - 1} for its {num_classes} classes."
            )


def _missing_path(name: str, what: str, path: str) -> str:
    root = os.environ.get("DETECTRON2_DATASETS")
    where = f"it is '{root}' now" if root else "it is not set, so 'datasets' is used"
    return (
        f"The data set '{name}' lacks its {what} {path}: put it there, or set the environment "
        f"variable DETECTRON2_DATASETS to the folder that holds the built-in data sets ({where})."
    )


def _suggestion(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    return (
        ": use a name of Detectron2's DatasetCatalog, or set dataset.json_file and "
        "dataset.image_root to register your own files under this name."
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
