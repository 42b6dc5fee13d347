"""The catalogs of datasets and metadata."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def name():
    name = "test_catalog_dataset"
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)


def test_datasets_are_made_when_asked_for(name):
    calls = []

    def load():
        calls.append(name)
        return [{"image_id": 3}]

    DatasetCatalog.register(name, load)
    assert calls == []
    assert DatasetCatalog.get(name) == [{"image_id": 3}]
    assert name in DatasetCatalog
    assert name in DatasetCatalog.list()
    with pytest.raises(AssertionError):
        DatasetCatalog.register(name, list)
    DatasetCatalog.remove(name)
    with pytest.raises(KeyError, match=name):
        DatasetCatalog.get(name)


def test_only_functions_can_be_registered(name):
    with pytest.raises(AssertionError):
        DatasetCatalog.register(name, [{"image_id": 3}])  # type: ignore[arg-type]


def test_metadata_cannot_change(name):
    metadata = MetadataCatalog.get(name).set(thing_classes=["a", "b"])
    assert metadata is MetadataCatalog.get(name)
    metadata.thing_classes = ["a", "b"]
    with pytest.raises(AssertionError):
        metadata.thing_classes = ["a"]
    assert metadata.as_dict() == {"name": name, "thing_classes": ["a", "b"]}
    assert metadata.get("colors", 5) == 5
    assert not hasattr(metadata, "colors")
    with pytest.raises(AttributeError, match="thing_classes"):
        _ = metadata.colors
    with pytest.raises(AssertionError):
        MetadataCatalog.get("")


def test_coco_is_registered():
    metadata = MetadataCatalog.get("coco_2017_val")
    assert metadata.json_file.endswith("coco/annotations/instances_val2017.json")
    assert metadata.image_root.endswith("coco/val2017")
    assert metadata.evaluator_type == "coco"
    assert len(metadata.thing_classes) == 80
    assert metadata.thing_classes[9] == "traffic light"
    assert metadata.thing_classes[:2] == ["person", "bicycle"]
    assert metadata.thing_classes[-1] == "toothbrush"
    ids = metadata.thing_dataset_id_to_contiguous_id
    assert (ids[1], ids[11], ids[13], ids[90]) == (0, 10, 11, 79)  # COCO has no category 12
    assert {"coco_2017_train", "coco_2017_test-dev", "coco_2014_minival"} <= {*DatasetCatalog}
