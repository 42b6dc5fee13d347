"""Datasets in COCO's annotation format."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
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
    metadata get ``thing_classes`` and ``thing_dataset_id_to_contiguous_id``.
    ``extra_annotation_keys``, such as "segmentation", are kept as they are. Unlike there, objects
    stay whatever their polygons.

    Raises AssertionError if annotation ids repeat or an annotation is marked "ignore", KeyError if
    the file lacks its category, ValueError if its box is empty.
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


def convert_to_coco_json(dataset_name: str, output_file: str) -> None:
    """Write a registered dataset of boxes as a COCO annotation file, in one process at a time.

    Metadata ``thing_classes`` are needed; ``thing_dataset_id_to_contiguous_id`` is undone. Boxes
    without 4 numbers raise ValueError.
    """
    metadata = MetadataCatalog.get(dataset_name)
    id_map = metadata.get("thing_dataset_id_to_contiguous_id")
    ids = sorted(id_map, key=id_map.__getitem__) if id_map else range(len(metadata.thing_classes))
    categories = [{"id": k, "name": n} for k, n in zip(ids, metadata.thing_classes, strict=True)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, entry in enumerate(DatasetCatalog.get(dataset_name)):
        image = {key: entry[key] for key in ("width", "height", "file_name")}
        images.append({**image, "id": entry.get("image_id", index)})
        for obj in entry["annotations"]:
            if np.shape(obj["bbox"]) != (4,):
                raise ValueError(f"a bbox has 4 numbers, got {obj['bbox']}")
            box = [float(number) for number in obj["bbox"]]
            box = BoxMode.convert(box, obj["bbox_mode"], BoxMode.XYWH_ABS)
            written = {"id": len(annotations) + 1, "image_id": images[-1]["id"]}
            written.update(bbox=box, area=box[2] * box[3], iscrowd=obj.get("iscrowd", 0))
            annotations.append({**written, "category_id": ids[obj["category_id"]]})
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    PathManager.mkdirs(os.path.dirname(output_file))
    with file_lock(output_file):
        with PathManager.open(output_file + ".tmp", "w") as file:
            json.dump(content, file)
        os.replace(output_file + ".tmp", output_file)


def register_coco_instances(
    name: str, metadata: Mapping[str, Any], json_file: str, image_root: str | os.PathLike
) -> None:
    """Register a dataset whose file is read when first asked for; a known name is kept."""
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, partial(load_coco_json, json_file, image_root, name))
    paths = {"json_file": json_file, "image_root": image_root}
    MetadataCatalog.get(name).set(**paths, evaluator_type="coco", **metadata)
