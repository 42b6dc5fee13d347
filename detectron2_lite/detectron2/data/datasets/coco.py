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
    extra_annotation_keys: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One dictionary an image, by increasing id, with ``annotations`` as XYWH_ABS boxes.

    With a ``dataset_name``, category ids become 0 ... K-1 in the order of the file's ids, and its
    metadata are set. Masks are left out unless ``extra_annotation_keys`` name them; unlike in the
    real one, objects with broken polygons stay.
    """
    coco = open_coco_file(json_file)
    id_map = {category_id: k for k, category_id in enumerate(sorted(coco.getCatIds()))}
    if dataset_name is not None:
        names = [coco.cats[category_id]["name"] for category_id in id_map]
        metadata = MetadataCatalog.get(dataset_name)
        metadata.set(thing_classes=names, thing_dataset_id_to_contiguous_id=id_map)
    # COCO's own minival files of 2014 repeat some ids.
    unique = len(coco.anns) == len(coco.dataset.get("annotations", ()))
    assert unique or "minival" in json_file, f"annotation ids in {json_file} repeat"
    entries = []
    for image_id in sorted(coco.imgs):
        image = coco.imgs[image_id]
        objects = []
        for source in coco.imgToAnns[image_id]:
            where = f"annotation {source.get('id')} of image {image_id} in {json_file}"
            assert not source.get("ignore", 0), f'{where} is marked "ignore"'
            keys = ("iscrowd", "bbox", "category_id", *extra_annotation_keys)
            obj = {key: source[key] for key in keys if key in source}
            if "bbox" in obj and len(obj["bbox"]) == 0:
                raise ValueError(f"{where} has an empty bbox; give it x, y, width and height")
            if obj["category_id"] not in id_map:
                raise KeyError(f"{where} has category {obj['category_id']}, which the file lacks")
            if dataset_name is not None:
                obj["category_id"] = id_map[obj["category_id"]]
            objects.append({**obj, "bbox_mode": BoxMode.XYWH_ABS})
        path = os.path.join(image_root, image["file_name"])
        size = {"height": image["height"], "width": image["width"]}
        entries.append({"file_name": path, **size, "image_id": image_id, "annotations": objects})
    logger.info("Loaded %d images from %s", len(entries), json_file)
    return entries


def open_coco_file(json_file: str) -> COCO:
    """``pycocotools.coco.COCO`` without its messages."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(PathManager.get_local_path(json_file))


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """A registered dataset, which needs ``thing_classes``, as the content of a COCO file.

    Category ids are those before ``thing_dataset_id_to_contiguous_id``.
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
    named = [{"id": ids[index], "name": name} for index, name in categories.items()]
    info = {"date_created": str(datetime.now()), "description": "written by detectron2_lite"}
    result = {"info": info, "images": images, "categories": named, "licenses": None}
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
        area, counts = float(mask_util.area(mask)), mask["counts"]
        counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
        written.update(segmentation={**mask, "counts": counts}, area=area)
    elif mask is not None:
        raise TypeError(f"a segmentation is a list or a dict, got {type(mask)}")
    return written


def _polygon_area(polygon: Sequence[float]) -> float:
    """Area of a polygon x0, y0, x1, y1, ... without self-intersections (shoelace formula)."""
    x, y = np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Write a dataset as a COCO annotation file; an old file is kept if ``allow_cached``."""
    PathManager.mkdirs(os.path.dirname(output_file))
    with file_lock(output_file):  # one process at a time
        if PathManager.exists(output_file) and allow_cached:
            logger.warning("Using %s as it is; delete it if the dataset has changed", output_file)
            return
        with PathManager.open(output_file + ".tmp", "w") as file:
            json.dump(convert_to_coco_dict(dataset_name), file)
        shutil.move(output_file + ".tmp", output_file)


def register_coco_instances(
    name: str, metadata: Mapping[str, Any], json_file: str, image_root: str | os.PathLike
) -> None:
    """Register a dataset whose file is read when first asked for; a known name is kept."""
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, partial(load_coco_json, json_file, image_root, name))
    paths = {"json_file": json_file, "image_root": image_root}
    MetadataCatalog.get(name).set(**paths, evaluator_type="coco", **metadata)
