"""Datasets in COCO's annotation format."""

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import file_lock
from pycocotools.coco import COCO

from ..catalog import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)


def load_coco_json(
    json_file: str,
    image_root: str | os.PathLike,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Read a COCO annotation file; the images themselves are not opened.

    Args:
        json_file: path of the file.
        image_root: folder of the images.
        dataset_name: where given, category ids become 0 ... K-1 in the order of the file's ids,
            and ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` are set in the
            dataset's metadata.
        extra_annotation_keys: further keys of annotations to keep.

    Returns:
        One dictionary an image, by increasing image id: ``file_name``, ``height``, ``width``,
        ``image_id`` and ``annotations`` with ``bbox``, ``bbox_mode``, ``category_id``,
        ``iscrowd`` and, where the file has them, ``segmentation`` and ``keypoints``. Objects all
        of whose polygons have less than three points are left out.

    Raises:
        AssertionError: annotation ids repeat, or an annotation is marked "ignore".
        KeyError: the category of an annotation is not in the file.
        ValueError: an annotation has an empty box.
    """
    json_file = PathManager.get_local_path(json_file)
    coco = open_coco_file(json_file)
    id_map = None if dataset_name is None else _set_categories(coco, dataset_name)
    matched = [obj for image_id in coco.imgs for obj in coco.imgToAnns[image_id]]
    if len(matched) < len(coco.anns):
        logger.warning("%d annotations of %s have no image", len(coco.anns) - len(matched), json_file)
    if "minival" not in json_file:  # COCO's own minival files of 2014 repeat some ids
        unique = len({obj["id"] for obj in matched}) == len(matched)
        assert unique, f"annotation ids in {json_file} repeat; make them unique"
    keys = ["iscrowd", "bbox", "keypoints", "category_id", *(extra_annotation_keys or [])]
    entries = []
    for image_id in sorted(coco.imgs):
        image = coco.imgs[image_id]
        entry: dict[str, Any] = {"file_name": os.path.join(image_root, image["file_name"])}
        entry.update(height=image["height"], width=image["width"], image_id=image_id)
        read = (_read_annotation(obj, keys, id_map) for obj in coco.imgToAnns[image_id])
        entry["annotations"] = [obj for obj in read if obj is not None]
        entries.append(entry)
    unusable = len(matched) - sum(len(entry["annotations"]) for entry in entries)
    if unusable:
        logger.warning("%d objects of %s have no valid polygon; left out", unusable, json_file)
    logger.info("Loaded %d images from %s", len(entries), json_file)
    return entries


def open_coco_file(json_file: str) -> COCO:
    """``pycocotools.coco.COCO`` without its messages."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(json_file)


def _set_categories(coco: COCO, dataset_name: str) -> dict[int, int]:
    """Store names and contiguous ids of a dataset's categories; returns {id in file: id}."""
    category_ids = sorted(coco.getCatIds())
    if category_ids != list(range(1, len(category_ids) + 1)) and "coco" not in dataset_name:
        logger.warning("Category ids of '%s' are not 1 ... K; they are renumbered", dataset_name)
    id_map = {category_id: index for index, category_id in enumerate(category_ids)}
    metadata = MetadataCatalog.get(dataset_name)
    metadata.thing_classes = [coco.cats[category_id]["name"] for category_id in category_ids]
    metadata.thing_dataset_id_to_contiguous_id = id_map
    return id_map


def _read_annotation(
    source: Mapping[str, Any], keys: Sequence[str], id_map: Mapping[int, int] | None
) -> dict[str, Any] | None:
    """One object; None where its polygons are all invalid."""
    where = f"annotation {source.get('id')} of image {source['image_id']}"
    assert not source.get("ignore", 0), f'{where} is marked "ignore", which is not supported'
    obj = {key: source[key] for key in keys if key in source}
    if "bbox" in obj and len(obj["bbox"]) == 0:
        raise ValueError(f"{where} has an empty bbox; give it x, y, width and height")
    mask = source.get("segmentation")
    if isinstance(mask, dict) and isinstance(mask["counts"], list):
        mask = mask_util.frPyObjects(mask, *mask["size"])
    if mask:
        if isinstance(mask, list):
            mask = [points for points in mask if len(points) % 2 == 0 and len(points) >= 6]
        if not mask:
            return None
        obj["segmentation"] = mask
    if obj.get("keypoints"):  # pixel indices (x, y, visibility); the middle of a pixel is at 0.5
        obj["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(obj["keypoints"])]
    obj["bbox_mode"] = BoxMode.XYWH_ABS
    if id_map is not None:
        if obj["category_id"] not in id_map:
            raise KeyError(f"{where} has category {obj['category_id']}, which the file lacks")
        obj["category_id"] = id_map[obj["category_id"]]
    return obj


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """A registered dataset in the structure of a COCO annotation file.

    Metadata ``thing_classes`` are needed; ``thing_dataset_id_to_contiguous_id`` is undone. Boxes
    without 4 numbers raise ValueError, segmentations of unknown type TypeError.
    """
    metadata = MetadataCatalog.get(dataset_name)
    categories = dict(enumerate(metadata.thing_classes))
    id_map = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in categories}
    ids = {contiguous: category_id for category_id, contiguous in id_map.items()}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, entry in enumerate(DatasetCatalog.get(dataset_name)):
        image_id = entry.get("image_id", index)
        size = {"width": int(entry["width"]), "height": int(entry["height"])}
        images.append({"id": image_id, **size, "file_name": str(entry["file_name"])})
        for obj in entry.get("annotations", []):
            head = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**head, **_write_annotation(obj, ids)})
    result = {
        "info": {"date_created": str(datetime.now()), "description": "written by detectron2_lite"},
        "images": images,
        "categories": [{"id": ids[index], "name": name} for index, name in categories.items()],
        "licenses": None,
    }
    return {**result, "annotations": annotations} if annotations else result


def _write_annotation(obj: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    box = np.asarray(obj["bbox"])
    if box.shape != (4,):
        raise ValueError(f"a bbox has 4 numbers, got {obj['bbox']}")
    box = BoxMode.convert(box.tolist(), obj["bbox_mode"], BoxMode.XYWH_ABS)
    written = {
        "bbox": [round(float(value), 3) for value in box],
        "area": float(box[2] * box[3]),
        "iscrowd": int(obj.get("iscrowd", 0)),
        "category_id": int(ids[obj["category_id"]]),
    }
    mask = obj.get("segmentation")
    if isinstance(mask, list):
        written.update(segmentation=mask, area=sum(_polygon_area(polygon) for polygon in mask))
    elif isinstance(mask, dict):
        counts = mask["counts"]
        counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
        area = float(mask_util.area(mask))
        written.update(segmentation={**mask, "counts": counts}, area=area)
    elif mask is not None:
        raise TypeError(f"a segmentation is a list or a dict, got {type(mask)}")
    return written


def _polygon_area(polygon: Sequence[float]) -> float:
    """Area of a polygon x0, y0, x1, y1, ... without self-intersections (shoelace formula)."""
    x, y = np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Write a registered dataset as a COCO annotation file, one process at a time.

    A file that exists already is kept if ``allow_cached``.
    """
    PathManager.mkdirs(os.path.dirname(output_file))
    with file_lock(output_file):
        if PathManager.exists(output_file) and allow_cached:
            logger.warning("Using %s as it is; delete it if the dataset has changed", output_file)
            return
        temporary = output_file + ".tmp"
        with PathManager.open(temporary, "w") as file:
            json.dump(convert_to_coco_dict(dataset_name), file)
        shutil.move(temporary, output_file)


def register_coco_instances(
    name: str, metadata: Mapping[str, Any], json_file: str, image_root: str | os.PathLike
) -> None:
    """Register a dataset in COCO's format; ``json_file`` is read when it is first asked for.

    ``metadata`` are further facts for its metadata. If the name is registered already, only the
    metadata are set.
    """
    assert isinstance(name, str), name
    for path in (json_file, image_root):
        assert isinstance(path, (str, os.PathLike)), f"dataset '{name}': {path!r} is not a path"
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, partial(load_coco_json, json_file, image_root, name))
    paths = {"json_file": json_file, "image_root": image_root}
    MetadataCatalog.get(name).set(**paths, evaluator_type="coco", **metadata)
