"""Reading, registering and writing datasets in COCO's format."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import (
    convert_to_coco_json,
    load_coco_json,
    register_coco_instances,
)
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import BoxMode

TRIANGLE = [0.0, 0.0, 4.0, 0.0, 0.0, 3.0]  # area 4 * 3 / 2 = 6
CATEGORIES = [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}, {"id": 12, "name": "c"}]


def annotation(number, image_id, category_id, **others):
    box = {"bbox": [1.0, 2.0, 3.0, 4.0], "area": 12.0, "iscrowd": 0}
    return {"id": number, "image_id": image_id, "category_id": category_id, **box, **others}


def write(path, annotations):
    images = [{"id": k, "file_name": f"{k}.png", "width": 60, "height": 40} for k in (5, 2, 9)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def name():
    name = "test_coco_dataset"
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)


def test_images_and_categories_are_sorted(tmp_path, name):
    annotations = [annotation(1, 5, 12), annotation(2, 2, 3), annotation(3, 2, 7)]
    file = write(tmp_path / "a.json", annotations)
    entries = load_coco_json(file, "images", name)
    assert [entry["image_id"] for entry in entries] == [2, 5, 9]
    assert [obj["category_id"] for obj in entries[0]["annotations"]] == [0, 1]
    assert entries[1]["annotations"] == [
        {
            "bbox": [1.0, 2.0, 3.0, 4.0],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 2,
            "iscrowd": 0,
        }
    ]
    assert entries[2]["annotations"] == []
    assert Path(entries[0]["file_name"]) == Path("images/2.png")
    assert (entries[0]["height"], entries[0]["width"]) == (40, 60)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["a", "b", "c"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1, 12: 2}


def test_without_a_name_categories_stay(tmp_path):
    file = write(tmp_path / "a.json", [annotation(1, 5, 12, score=0.5)])
    entry = load_coco_json(file, "", extra_annotation_keys=["score"])[1]
    assert entry["annotations"][0]["category_id"] == 12
    assert entry["annotations"][0]["score"] == 0.5


@pytest.mark.parametrize(
    ("annotations", "error"),
    [
        ([annotation(1, 5, 3), annotation(1, 2, 3)], AssertionError),
        ([annotation(1, 5, 3, ignore=1)], AssertionError),
        ([annotation(1, 5, 3, bbox=[])], ValueError),
        ([annotation(1, 5, 4)], KeyError),
    ],
    ids=["repeated id", "ignore", "empty box", "unknown category"],
)
def test_broken_files(tmp_path, name, annotations, error):
    with pytest.raises(error):
        load_coco_json(write(tmp_path / "a.json", annotations), "", name)


def test_registration_is_lazy_and_first_come(tmp_path, name):
    register_coco_instances(name, {"extra": 1}, str(tmp_path / "a.json"), "images")
    write(tmp_path / "a.json", [annotation(1, 5, 12)])
    assert len(DatasetCatalog.get(name)) == 3
    metadata = MetadataCatalog.get(name)
    assert (metadata.extra, metadata.evaluator_type) == (1, "coco")
    assert metadata.image_root == "images"
    register_coco_instances(name, {}, str(tmp_path / "a.json"), "images")
    with pytest.raises(AssertionError):
        register_coco_instances(name, {}, str(tmp_path / "b.json"), "images")


def test_images_without_objects_are_filtered(tmp_path, name):
    file = write(tmp_path / "a.json", [annotation(1, 5, 3), annotation(2, 9, 3, iscrowd=1)])
    register_coco_instances(name, {}, file, "images")
    assert [entry["image_id"] for entry in get_detection_dataset_dicts(name)] == [5]
    everything = get_detection_dataset_dicts([name], filter_empty=False)
    assert [entry["image_id"] for entry in everything] == [2, 5, 9]


def test_joined_datasets_need_equal_classes(tmp_path, name):
    file = write(tmp_path / "a.json", [annotation(1, 5, 3)])
    register_coco_instances(name, {}, file, "images")
    entry = {"file_name": "x.png", "height": 1, "width": 1, "image_id": 1}
    box = {"bbox": [0, 0, 1, 1], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    other, empty = name + "_other", name + "_empty"
    DatasetCatalog.register(other, lambda: [{**entry, "annotations": [box]}])
    DatasetCatalog.register(empty, list)
    MetadataCatalog.get(other).thing_classes = ["something else"]
    try:
        with pytest.raises(ValueError, match="thing_classes"):
            get_detection_dataset_dicts([name, other])
        assert len(get_detection_dataset_dicts([name, other], check_consistency=False)) == 2
        with pytest.raises(AssertionError, match=empty):
            get_detection_dataset_dicts(empty)
    finally:
        for added in (other, empty):
            DatasetCatalog.remove(added)
        MetadataCatalog.remove(other)


def test_conversion_to_coco(tmp_path, name):
    objects = [
        {"bbox": np.array([1.0, 2.0, 4.0, 8.00049]), "bbox_mode": BoxMode.XYXY_ABS},
        {"bbox": [0, 0, 4, 3], "bbox_mode": BoxMode.XYWH_ABS, "segmentation": [TRIANGLE]},
    ]
    for category, obj in enumerate(objects):
        obj["category_id"] = category
    entry = {"file_name": "a.png", "height": 40, "width": 60, "image_id": 4}
    DatasetCatalog.register(name, lambda: [{**entry, "annotations": objects}])
    metadata = MetadataCatalog.get(name)
    metadata.set(thing_classes=["x", "y"], thing_dataset_id_to_contiguous_id={5: 0, 8: 1})
    file = tmp_path / "out" / "a.json"
    convert_to_coco_json(name, str(file))
    content = json.loads(file.read_text())
    assert content["images"] == [{"id": 4, "width": 60, "height": 40, "file_name": "a.png"}]
    assert content["categories"] == [{"id": 5, "name": "x"}, {"id": 8, "name": "y"}]
    first, second = content["annotations"]
    assert first["bbox"] == [1, 2, 3, 6]
    assert first["area"] == pytest.approx(18.0015, abs=1e-3)
    assert (first["id"], first["image_id"], first["category_id"], first["iscrowd"]) == (1, 4, 5, 0)
    assert second["area"] == 6  # the triangle's, not the box's
    assert second["segmentation"] == [TRIANGLE]
    before = file.stat().st_mtime_ns
    convert_to_coco_json(name, str(file))
    assert file.stat().st_mtime_ns == before
    convert_to_coco_json(name, str(file), allow_cached=False)
    assert file.stat().st_mtime_ns > before
    assert load_coco_json(str(file), "")[0]["annotations"][1]["category_id"] == 8


def test_conversion_refuses_broken_boxes(name):
    obj = {"bbox": np.zeros((1, 4)), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    entry = {"file_name": "a.png", "height": 4, "width": 6, "annotations": [obj]}
    DatasetCatalog.register(name, lambda: [entry])
    MetadataCatalog.get(name).thing_classes = ["x"]
    with pytest.raises(ValueError, match="bbox"):
        convert_to_coco_dict(name)


def test_run_length_encoded_masks_become_text(name):
    # Runs of 0 and 1 alternate: 1 pixel outside, 2 inside, 9 outside.
    mask = pycocotools.mask.frPyObjects({"size": [3, 4], "counts": [1, 2, 9]}, 3, 4)
    text = mask["counts"].decode()
    obj = {"bbox": [0, 1, 1, 2], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    entry = {"file_name": "a.png", "height": 3, "width": 4}
    annotations = [{**obj, "segmentation": mask}]
    DatasetCatalog.register(name, lambda: [{**entry, "annotations": annotations}])
    MetadataCatalog.get(name).thing_classes = ["x"]
    (written,) = convert_to_coco_dict(name)["annotations"]
    assert written["area"] == 2
    assert written["segmentation"] == {"size": [3, 4], "counts": text}


def test_coco_has_colours():
    metadata = MetadataCatalog.get("coco_2017_val")
    things = [category for category in COCO_CATEGORIES if category["isthing"]]
    assert metadata.thing_colors == [category["color"] for category in things]
    assert (things[0]["name"], metadata.thing_colors[0]) == ("person", [220, 20, 60])
    assert len(metadata.thing_colors) == len(metadata.thing_classes) == 80
