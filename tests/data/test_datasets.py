"""Data sets by name and by file."""

import json
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from efficient_detr.data.datasets import (
    check_annotations,
    check_dataset_files,
    class_names,
    detection_dataset,
    register_coco,
)
from efficient_detr.errors import UserError
from tests.engine.tiny import write_split


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    write_split(tmp_path, "train")
    return {"json_file": str(tmp_path / "train.json"), "image_root": str(tmp_path / "train")}


@pytest.fixture
def name(tmp_path: Path) -> str:
    """Unique, because Detectron2's catalog is global."""
    return f"data_{tmp_path.name}"


def change(files: dict[str, Any], key: str, value: Any) -> None:
    path = Path(files["json_file"])
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def test_files_become_records(files: dict[str, Any], name: str) -> None:
    records = detection_dataset(name, **files)
    assert len(records) == 6
    assert records[0]["file_name"] == files["image_root"] + "/1.png"
    # Category ids 1..3 of the file are classes 0..2 of the model; image 1 has ids 2 and 3.
    assert [a["category_id"] for a in records[0]["annotations"]] == [1, 2]
    assert MetadataCatalog.get(name).thing_classes == ["square", "disc", "cross"]
    assert MetadataCatalog.get(name).json_file == files["json_file"]


def test_loading_twice_is_fine(files: dict[str, Any], name: str) -> None:
    assert detection_dataset(name, **files) == detection_dataset(name, **files)


def test_several_data_sets_are_joined(files: dict[str, Any], name: str) -> None:
    register_coco(f"{name}_a", **files)
    register_coco(f"{name}_b", **files)
    assert len(detection_dataset([f"{name}_a", f"{name}_b"])) == 12


def test_data_sets_with_other_classes_are_not_joined(
    files: dict[str, Any], name: str, tmp_path: Path
) -> None:
    write_split(tmp_path / "other", "train")
    other = {"json_file": f"{tmp_path}/other/train.json", "image_root": f"{tmp_path}/other/train"}
    names = [{"id": i, "name": c} for i, c in enumerate("abc", start=1)]
    change(other, "categories", names)
    register_coco(f"{name}_a", **files)
    register_coco(f"{name}_b", **other)
    with pytest.raises(UserError, match="different classes"):
        detection_dataset([f"{name}_a", f"{name}_b"])


def test_empty_images_are_dropped_for_training(files: dict[str, Any], name: str) -> None:
    annotations = json.loads(Path(files["json_file"]).read_text())["annotations"]
    change(files, "annotations", [a for a in annotations if a["image_id"] != 2])
    assert len(detection_dataset(name, **files)) == 5
    assert len(detection_dataset(name, **files, filter_empty=False)) == 6


def test_only_empty_images(files: dict[str, Any], name: str) -> None:
    change(files, "annotations", [])
    with pytest.raises(UserError, match=name):
        detection_dataset(name, **files)


def test_a_name_that_is_taken(files: dict[str, Any], name: str) -> None:
    register_coco(name, **files)
    with pytest.raises(UserError, match=r"already stands for .*train\.json: give other\.json"):
        register_coco(name, json_file="other.json", image_root=files["image_root"])
    with pytest.raises(UserError, match="'coco_2017_val' already stands for"):
        detection_dataset("coco_2017_val", **files)


@pytest.mark.parametrize("key", ["json_file", "image_root"])
def test_half_of_the_files(files: dict[str, Any], name: str, key: str) -> None:
    with pytest.raises(UserError, match="needs both paths"):
        detection_dataset(name, **{key: files[key]})


def test_files_for_two_names(files: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="exactly one data set name"):
        detection_dataset(["a", "b"], **files)


@pytest.mark.parametrize("category", [9, 0, -1])
def test_a_category_id_that_the_file_does_not_define(
    files: dict[str, Any], name: str, category: int
) -> None:
    annotations = json.loads(Path(files["json_file"]).read_text())["annotations"]
    annotations[3]["category_id"] = category
    change(files, "annotations", annotations)
    with pytest.raises(UserError, match=rf"category\D*?{category}\b") as caught:
        detection_dataset(name, **files)
    assert files["json_file"] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("iscrowd", ..., 'lacks iscrowd: add "iscrowd": 0.'),
        ("iscrowd", None, "has the iscrowd null"),
        ("area", ..., 'lacks area: add "area": width * height.'),
        ("area", "big", 'has the area "big"'),
        ("bbox", ..., "lacks bbox: give four finite numbers"),
        ("bbox", None, "has the bbox null"),
        ("bbox", [1, 2, 3], "has the bbox [1, 2, 3]"),
        ("bbox", [1, 2, 3, float("nan")], "has the bbox [1, 2, 3, NaN]"),
        ("bbox", [1, 2, 3, "4"], "has the bbox"),
        ("category_id", ..., "lacks category_id"),
        ("image_id", ..., "lacks image_id"),
        ("id", ..., "Annotation number 4 (image 2)"),
    ],
)
def test_an_incomplete_annotation(
    files: dict[str, Any], name: str, key: str, value: Any, hint: str
) -> None:
    annotations = json.loads(Path(files["json_file"]).read_text())["annotations"]
    if value is ...:
        del annotations[3][key]
    else:
        annotations[3][key] = value
    change(files, "annotations", annotations)
    with pytest.raises(UserError) as caught:
        detection_dataset(name, **files)
    text = str(caught.value)
    assert hint in text
    assert files["json_file"] in text
    assert key == "id" or text.startswith("Annotation 4 (image ")


@pytest.mark.parametrize("part", ["images", "categories"])
def test_ids_that_are_not_unique(files: dict[str, Any], name: str, part: str) -> None:
    entries = json.loads(Path(files["json_file"]).read_text())[part]
    change(files, part, [*entries, entries[1]])
    with pytest.raises(UserError, match=f"has several '{part}' with the id 2: give each an id"):
        detection_dataset(name, **files)


def test_a_file_is_checked_once_until_it_changes(
    files: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_coco(name, **files)
    check_annotations(name)
    with monkeypatch.context() as patch:
        patch.setattr(json, "load", None)
        check_annotations(name)
    change(files, "images", [])
    change(files, "annotations", [{}])
    with pytest.raises(UserError, match="lacks id"):
        check_annotations(name)


def test_other_formats_and_missing_files_are_left_alone(files: dict[str, Any], name: str) -> None:
    register_coco(name, json_file="absent.json", image_root=".")
    check_annotations(name)
    MetadataCatalog.get(f"{name}_other").set(json_file=files["json_file"], evaluator_type="lvis")
    change(files, "annotations", [{}])
    check_annotations(f"{name}_other")


def test_records_of_own_making_are_checked_too(name: str) -> None:
    def make() -> list[dict[str, Any]]:
        annotation = {"bbox": [0, 0, 1, 1], "bbox_mode": 1, "category_id": 3}
        return [{"image_id": 4, "file_name": "four.jpg", "annotations": [annotation]}]

    DatasetCatalog.register(name, make)
    MetadataCatalog.get(name).thing_classes = ["a", "b", "c"]
    with pytest.raises(UserError, match=r"Image 4 \(four\.jpg\).* category id 3.* 0\.\.2"):
        detection_dataset(name)


def test_json_that_is_none(files: dict[str, Any], name: str) -> None:
    Path(files["json_file"]).write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        detection_dataset(name, **files)


def test_class_names_before_loading(files: dict[str, Any], name: str) -> None:
    register_coco(name, **files)
    assert class_names(name) == ["square", "disc", "cross"]
    assert class_names(f"{name}_unknown") is None


def test_built_in_classes_need_no_file() -> None:
    classes = class_names("coco_2017_val")
    assert classes is not None
    assert len(classes) == 80


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match=r"no data set 'coco_2017_trian'; did you mean 'coco_2017"):
        check_dataset_files("coco_2017_trian")
    with pytest.raises(UserError, match=r"set dataset\.json_file"):
        check_dataset_files("zzzzzzzz")
