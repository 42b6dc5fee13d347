"""From a record to a model input."""

from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image

from efficient_detr.data.mapper import DetrDatasetMapper
from efficient_detr.data.seeding import temporary_seed
from efficient_detr.errors import UserError

WIDTH, HEIGHT = 60, 40


def annotation(*box: float, category: int = 0, **more: Any) -> dict[str, Any]:
    return {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": category, **more}


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:, :, 0] = 200  # red
    pixels[:, :10, 2] = 100  # blue at the left
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return {
        "file_name": str(path),
        "image_id": 17,
        "width": WIDTH,
        "height": HEIGHT,
        "annotations": [annotation(10, 5, 20, 30, category=2), annotation(0, 0, 6, 4, category=1)],
    }


def test_training_input(record: dict[str, Any]) -> None:
    # Short side 40 -> 80: everything doubles. XYWH (10, 5, 20, 30) -> corners (20, 10, 60, 70).
    mapper = DetrDatasetMapper(augmentations=[T.ResizeShortestEdge(80, 999)], is_train=True)
    mapped = mapper(record)
    assert mapped["image"].dtype == torch.uint8
    assert mapped["image"].shape == (3, 80, 120)
    assert (mapped["height"], mapped["width"], mapped["image_id"]) == (HEIGHT, WIDTH, 17)
    instances = mapped["instances"]
    assert instances.image_size == (80, 120)
    expected = torch.tensor([[20.0, 10.0, 60.0, 70.0], [0.0, 0.0, 12.0, 8.0]])
    torch.testing.assert_close(instances.gt_boxes.tensor, expected)
    assert instances.gt_classes.tolist() == [2, 1]
    assert "annotations" not in mapped
    assert "annotations" in record, "the record belongs to the data set"


def test_flip_moves_boxes_with_the_pixels(record: dict[str, Any]) -> None:
    # x1 = 60 - (10 + 20) = 30, x2 = 60 - 10 = 50.
    mapped = DetrDatasetMapper(augmentations=[T.HFlipTransform(WIDTH)], is_train=True)(record)
    assert mapped["instances"].gt_boxes.tensor[0].tolist() == [30.0, 5.0, 50.0, 35.0]
    assert mapped["image"][2, 0, -1] == 100


@pytest.mark.parametrize(("image_format", "red"), [("RGB", 0), ("BGR", 2)])
def test_channel_order(record: dict[str, Any], image_format: str, red: int) -> None:
    mapper = DetrDatasetMapper(augmentations=[], is_train=False, image_format=image_format)
    assert (mapper(record)["image"][red] == 200).all()


def test_unknown_channel_order() -> None:
    with pytest.raises(ValueError, match="image_format must be 'RGB' or 'BGR', not 'XYZ'"):
        DetrDatasetMapper(augmentations=[], is_train=True, image_format="XYZ")


def test_at_test_time_there_are_no_instances(record: dict[str, Any]) -> None:
    crop = [T.RandomCrop("absolute", (4, 4))]
    mapper = DetrDatasetMapper(augmentations=[], crop_augmentations=crop, is_train=False)
    for _ in range(20):
        mapped = mapper(record)
        assert mapped["image"].shape == (3, HEIGHT, WIDTH), "never cropped"
        assert mapped.keys() == {"file_name", "image_id", "width", "height", "image"}


def test_both_pipelines_are_used_about_equally(record: dict[str, Any]) -> None:
    crop = [T.RandomCrop("absolute", (20, 20))]
    mapper = DetrDatasetMapper(augmentations=[], crop_augmentations=crop, is_train=True)
    with temporary_seed(0):
        cropped = sum(mapper(record)["image"].shape == (3, 20, 20) for _ in range(200))
    # Binomial(200, 1/2): mean 100, standard deviation 7; six deviations.
    assert 58 < cropped < 142


def test_boxes_are_cut_at_the_crop_and_dropped_outside(record: dict[str, Any]) -> None:
    # The crop x 20..40, y 0..20 meets (10, 5, 30, 35) in x 20..30, y 5..20 -> (0, 5, 10, 20);
    # the other box ends at x = 6.
    mapped = DetrDatasetMapper(augmentations=[T.CropTransform(20, 0, 20, 20)], is_train=True)(
        record
    )
    assert mapped["instances"].gt_boxes.tensor.tolist() == [[0.0, 5.0, 10.0, 20.0]]
    assert mapped["instances"].gt_classes.tolist() == [2]


@pytest.mark.parametrize(
    "bad",
    [
        annotation(5, 5, 10, 10, iscrowd=1),
        annotation(5, 5, 0, 10),
        annotation(5, 5, -3, 10),
        annotation(70, 5, 10, 10),
        annotation(float("nan"), 5, 10, 10),
        annotation(5, 5, float("inf"), float("nan")),
    ],
    ids=["crowd", "no width", "negative width", "outside", "nan", "infinite"],
)
def test_useless_boxes_are_dropped(record: dict[str, Any], bad: dict[str, Any]) -> None:
    record["annotations"].insert(0, bad)
    mapped = DetrDatasetMapper(augmentations=[], is_train=True)(record)
    assert mapped["instances"].gt_classes.tolist() == [2, 1]


def test_an_image_without_boxes(record: dict[str, Any]) -> None:
    record["annotations"] = []
    instances = DetrDatasetMapper(augmentations=[], is_train=True)(record)["instances"]
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.shape == (0,)


def test_polygons_are_ignored(record: dict[str, Any]) -> None:
    record["annotations"][0]["segmentation"] = [[10, 5, 30, 5, 30, 35]]
    crop = T.CropTransform(0, 0, 50, 40)
    instances = DetrDatasetMapper(augmentations=[crop], is_train=True)(record)["instances"]
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes"}


def sentence(record: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        DetrDatasetMapper(augmentations=[], is_train=True)(record)
    text = str(caught.value)
    assert "\n" not in text
    assert "Image 17" in text
    assert record["file_name"] in text
    return text


def test_a_missing_picture(record: dict[str, Any]) -> None:
    Path(record["file_name"]).unlink()
    assert "cannot be read" in sentence(record)


def test_a_file_that_is_no_picture(record: dict[str, Any]) -> None:
    Path(record["file_name"]).write_text("hello")
    assert "cannot be read" in sentence(record)


def test_a_truncated_picture(record: dict[str, Any]) -> None:
    path = Path(record["file_name"])
    path.write_bytes(path.read_bytes()[:60])
    assert "cannot be read" in sentence(record)


def test_a_picture_of_another_size(record: dict[str, Any]) -> None:
    record["width"] = 61
    text = sentence(record)
    assert "60x40" in text
    assert "61x40" in text


@pytest.mark.parametrize(
    "bad",
    [
        {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},
        {"bbox": [1, 2, 3], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},
        {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS},
    ],
    ids=["no box", "three numbers", "no category"],
)
def test_a_broken_annotation(record: dict[str, Any], bad: dict[str, Any]) -> None:
    record["annotations"].append(bad)
    assert "correct the annotation file" in sentence(record)
