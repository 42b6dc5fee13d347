"""Datasets in COCO's annotation format."""

from __future__ import annotations

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
from iopath.common.file_io import file_lock
from pycocotools.coco import COCO

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..catalog import DatasetCatalog, MetadataCatalog

__all__ = ["convert_to_coco_json", "load_coco_json", "register_coco_instances"]
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
        ``iscrowd`` and, where the file has them, ``segmentation`` and ``keypoints``.

    Raises:
        AssertionError: annotation ids repeat, or an annotation is marked "ignore".
        KeyError: the category of an annotation is not in the file.
        ValueError: an annotation has an empty box.
    """
    json_file = PathManager.get_local_path(json_file)
    coco = _open_silently(json_file)
    id_map = None if dataset_name is None else _set_categories(coco, dataset_name)
    image_ids = sorted(coco.imgs)
    objects = [coco.imgToAnns[image_id] for image_id in image_ids]
    matched = sum(len(found) for found in objects)
    if matched < len(coco.anns):
        logger.warning("%d annotations of %s have no image", len(coco.anns) - matched, json_file)
    if "minival" not in json_file:  # COCO's own minival files of 2014 repeat some ids
        ids = {obj["id"] for found in objects for obj in found}
        assert len(ids) == matched, f"annotation ids in {json_file} repeat; make them unique"
    keys = ["iscrowd", "bbox", "keypoints", "category_id", *(extra_annotation_keys or [])]
    entries = []
    for image_id, found in zip(image_ids, objects):
        image = coco.imgs[image_id]
        read = [_read_annotation(obj, keys, id_map) for obj in found]
        entries.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image_id,
                "annotations": [obj for obj in read if obj is not None],
            }
        )
    unusable = matched - sum(len(entry["annotations"]) for entry in entries)
    if unusable:
        logger.warning("%d objects of %s have no valid polygon; left out", unusable, json_file)
    logger.info("Loaded %d images from %s", len(entries), json_file)
    return entries


def _open_silently(json_file: str) -> COCO:
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
    assert source.get("ignore", 0) == 0, f'{where} is marked "ignore", which is not supported'
    obj = {key: source[key] for key in keys if key in source}
    if "bbox" in obj and len(obj["bbox"]) == 0:
        raise ValueError(f"{where} has an empty bbox; give it x, y, width and height")
    segmentation = source.get("segmentation")
    if isinstance(segmentation, dict) and segmentation:
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
        obj["segmentation"] = segmentation
    elif segmentation:
        obj["segmentation"] = [p for p in segmentation if len(p) % 2 == 0 and len(p) >= 6]
        if not obj["segmentation"]:
            return None
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

    Metadata ``thing_classes`` are needed; ``thing_dataset_id_to_contiguous_id`` is undone.

    Raises:
        TypeError: a segmentation is neither polygons nor a run-length encoded mask.
        ValueError: a box has not 4 numbers.
    """
    metadata = MetadataCatalog.get(dataset_name)
    forward = metadata.get("thing_dataset_id_to_contiguous_id")
    names = metadata.thing_classes
    ids = {v: k for k, v in forward.items()} if forward else {i: i for i in range(len(names))}
    images, annotations = [], []
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
        "categories": [{"id": ids[index], "name": name} for index, name in enumerate(names)],
        "licenses": None,
    }
    return {**result, "annotations": annotations} if annotations else result


def _write_annotation(obj: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    box = np.asarray(obj["bbox"])
    if box.shape != (4,):
        raise ValueError(f"a bbox has 4 numbers, got {obj['bbox']}")
    x, y, width, height = BoxMode.convert(box.tolist(), obj["bbox_mode"], BoxMode.XYWH_ABS)
    written = {
        "bbox": [round(float(value), 3) for value in (x, y, width, height)],
        "area": float(width * height),
        "iscrowd": int(obj.get("iscrowd", 0)),
        "category_id": int(ids[obj["category_id"]]),
    }
    if "segmentation" in obj:
        segmentation = obj["segmentation"]
        if isinstance(segmentation, list):
            written["area"] = sum(_polygon_area(polygon) for polygon in segmentation)
        elif isinstance(segmentation, dict):
            written["area"] = float(mask_util.area(segmentation))
            if isinstance(segmentation["counts"], bytes):
                segmentation = {**segmentation, "counts": segmentation["counts"].decode("ascii")}
        else:
            raise TypeError(f"a segmentation is a list or a dict, got {type(segmentation)}")
        written["segmentation"] = segmentation
    return written


def _polygon_area(polygon: Sequence[float]) -> float:
    """Area of a polygon x0, y0, x1, y1, ... without self-intersections (shoelace formula)."""
    x, y = np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Write a registered dataset as a COCO annotation file.

    Args:
        dataset_name: a registered name.
        output_file: path of the file; other processes wait while one writes it.
        allow_cached: keep a file that exists already.
    """
    PathManager.mkdirs(os.path.dirname(output_file))
    with file_lock(output_file):
        if PathManager.exists(output_file) and allow_cached:
            logger.warning("Using %s as it is; delete it if the dataset has changed", output_file)
            return
        content = convert_to_coco_dict(dataset_name)
        temporary = output_file + ".tmp"
        with PathManager.open(temporary, "w") as file:
            json.dump(content, file)
        shutil.move(temporary, output_file)


def register_coco_instances(
    name: str, metadata: Mapping[str, Any], json_file: str, image_root: str | os.PathLike
) -> None:
    """Register a dataset in COCO's format; the files are read when it is first asked for.

    Args:
        name: of the dataset. If it is registered already, only the metadata are set.
        metadata: further facts for its metadata; may be empty.
        json_file: annotation file.
        image_root: folder of the images.
    """
    assert isinstance(name, str), name
    for path in (json_file, image_root):
        assert isinstance(path, (str, os.PathLike)), f"dataset '{name}': {path!r} is not a path"
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, partial(load_coco_json, json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )
