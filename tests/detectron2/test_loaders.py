"""Datasets, samplers, mappers and loaders."""

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    build_detection_test_loader,
    build_detection_train_loader,
    detection_utils,
)
from detectron2.data import transforms as T
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import (
    InferenceSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import SequentialSampler


def first(iterable, count):
    return list(itertools.islice(iterable, count))


def in_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)


def test_training_sampler_shuffles_every_epoch_by_seed():
    indices = first(TrainingSampler(10, seed=4), 20)
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]
    assert indices == first(TrainingSampler(10, seed=4), 20)
    generator = torch.Generator()
    generator.manual_seed(4)
    assert indices[:10] == torch.randperm(10, generator=generator).tolist()
    assert first(TrainingSampler(3, shuffle=False), 5) == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="positive"):
        TrainingSampler(0)
    with pytest.raises(TypeError):
        TrainingSampler(2.0)  # type: ignore[arg-type]


def test_processes_share_one_stream(monkeypatch):
    whole = first(TrainingSampler(7, seed=1), 12)
    for rank in range(3):
        in_process(monkeypatch, rank, 3)
        assert first(TrainingSampler(7, seed=1), 4) == whole[rank::3]


def test_inference_sampler_visits_everything_once(monkeypatch):
    shares = []
    for rank in range(4):
        in_process(monkeypatch, rank, 4)
        shares.append(list(InferenceSampler(10)))
        assert len(InferenceSampler(10)) == len(shares[-1])
    assert shares == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]


def test_rare_classes_are_repeated():
    images: list[dict[str, Any]] = [
        {"annotations": [{"category_id": 0}]},
        {"annotations": [{"category_id": 0}, {"category_id": 1}, {"category_id": 1}]},
        {"annotations": []},
        {"annotations": [{"category_id": 0}]},
    ]
    # Class 1 is in 1/4 of the images: sqrt(1 / (1/4)) = 2. Class 0 in 3/4: sqrt(4/3).
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(images, 1.0)
    assert factors.tolist() == pytest.approx([(4 / 3) ** 0.5, 2, 1, (4 / 3) ** 0.5])
    sampler = RepeatFactorTrainingSampler(torch.tensor([1.0, 2.0, 0.5]), seed=0)
    counts = np.bincount(first(sampler, 3500), minlength=3) / 1000
    assert counts == pytest.approx([1, 2, 0.5], abs=0.05)


@pytest.mark.parametrize("serialize", [True, False])
def test_lists_hand_out_copies(serialize):
    source = [{"boxes": [k]} for k in range(3)]
    dataset = DatasetFromList(source, serialize=serialize)
    assert len(dataset) == 3
    dataset[1]["boxes"].append(9)
    assert dataset[1] == {"boxes": [1]}
    assert [dataset[k]["boxes"] for k in range(3)] == [[0], [1], [2]]
    assert pickle.loads(pickle.dumps(dataset))[2] == {"boxes": [2]}


def add_ten(sample):
    return None if sample == 2 else sample + 10


def test_failed_samples_are_replaced():
    dataset = MapDataset(DatasetFromList([0, 1, 2, 3]), add_ten)
    assert len(dataset) == 4
    assert [dataset[k] for k in (0, 1, 3)] == [10, 11, 13]
    assert dataset[2] in (10, 11, 13)
    assert pickle.loads(pickle.dumps(dataset))[1] == 11


@pytest.fixture
def images(tmp_path):
    entries = []
    for number, (height, width) in enumerate([(20, 30), (30, 20), (20, 40), (24, 24)]):
        path = tmp_path / f"{number}.png"
        pixels = np.full((height, width, 3), (10, 20, 30), np.uint8)
        Image.fromarray(pixels).save(path)
        boxes = [[2, 3, 10, 8], [0, 0, 5, 5]]
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": k, "iscrowd": k}
            for k, box in enumerate(boxes)
        ]
        size = {"height": height, "width": width, "image_id": number}
        entries.append({"file_name": str(path), **size, "annotations": annotations})
    return entries


def test_mapper_for_training(images):
    mapper = DatasetMapper(
        is_train=True, augmentations=[T.Resize((40, 60)), T.HFlipTransform(60)], image_format="BGR"
    )
    mapped = mapper(images[0])
    assert mapped["image"].dtype == torch.uint8
    assert mapped["image"].shape == (3, 40, 60)
    assert mapped["image"][:, 0, 0].tolist() == [30, 20, 10]
    # (2, 3, 12, 11) twice as large is (4, 6, 24, 22); mirrored at width 60.
    assert mapped["instances"].gt_boxes.tensor.tolist() == [[36, 6, 56, 22]]
    assert mapped["instances"].gt_classes.tolist() == [0]  # the other one is a crowd
    assert mapped["instances"].image_size == (40, 60)
    assert (mapped["height"], mapped["width"]) == (20, 30)
    assert "annotations" not in mapped
    assert images[0]["annotations"][0]["bbox"] == [2, 3, 10, 8]


def test_mapper_for_inference(images):
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="RGB")
    mapped = mapper(images[1])
    assert mapped["image"][:, 0, 0].tolist() == [10, 20, 30]
    assert not {"annotations", "instances"} & set(mapped)


def test_objects_outside_a_crop_are_dropped(images):
    class TopRight(T.Augmentation):
        def get_transform(self, image):
            return T.CropTransform(20, 0, 10, 10)

    mapped = DatasetMapper(is_train=True, augmentations=[TopRight()], image_format="RGB")(images[0])
    assert len(mapped["instances"]) == 0
    assert mapped["instances"].gt_boxes.tensor.shape == (0, 4)


def test_wrong_size_in_the_annotation(images):
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="RGB")
    with pytest.raises(detection_utils.SizeMismatchError, match=r"0\.png"):
        mapper({**images[0], "width": 31})
    filled = mapper({"file_name": images[0]["file_name"]})
    assert (filled["height"], filled["width"]) == (20, 30)


@pytest.mark.parametrize(("orientation", "shape"), [(1, (2, 3)), (3, (2, 3)), (6, (3, 2))])
def test_images_are_read_upright(tmp_path, orientation, shape):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[274] = orientation
    path = tmp_path / "a.png"
    image.save(path, exif=exif)
    read = detection_utils.read_image(str(path), "RGB")
    assert read.shape[:2] == shape
    # Orientation 3 was turned by 180 degrees, 6 by 90 degrees clockwise.
    corner = {1: (0, 0), 3: (1, 2), 6: (0, 1)}[orientation]
    assert read[corner].tolist() == [255, 255, 255]
    assert detection_utils.read_image(str(path), "L").shape == (*shape, 1)


def test_formats_convert_back_to_rgb(tmp_path):
    path = str(tmp_path / "a.png")
    Image.fromarray(np.full((2, 2, 3), (10, 20, 30), np.uint8)).save(path)
    for image_format in ("RGB", "BGR"):
        read = detection_utils.read_image(path, image_format)
        rgb = detection_utils.convert_image_to_rgb(read, image_format)
        assert rgb[0, 0].tolist() == [10, 20, 30]


def test_annotations_are_clipped_and_filtered():
    transforms = T.TransformList([T.HFlipTransform(60)])
    annotations = [
        {"bbox": [50.0, 5.0, 40.0, 10.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 4},
        {"bbox": [5.0, 5.0, 0.0, 10.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 5},
    ]
    moved = [
        detection_utils.transform_instance_annotations(obj, transforms, (40, 60))
        for obj in annotations
    ]
    # (50, 5, 90, 15) mirrored is (-30, 5, 10, 15), clipped (0, 5, 10, 15).
    assert moved[0]["bbox"].tolist() == [0, 5, 10, 15]
    assert moved[0]["bbox_mode"] == BoxMode.XYXY_ABS
    instances = detection_utils.annotations_to_instances(moved, (40, 60))
    assert instances.gt_classes.tolist() == [4, 5]
    assert instances.gt_classes.dtype == torch.int64
    kept, mask = detection_utils.filter_empty_instances(instances, return_mask=True)
    assert kept.gt_classes.tolist() == [4]
    assert mask.tolist() == [True, False]
    assert len(detection_utils.annotations_to_instances([], (40, 60))) == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_loader(images, num_workers):
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    loader = build_detection_train_loader(
        images,
        mapper=mapper,
        sampler=TrainingSampler(4, seed=0),
        total_batch_size=2,
        num_workers=num_workers,
    )
    for batch in first(loader, 5):
        assert len(batch) == 2
        wide = {image["width"] > image["height"] for image in batch}
        assert len(wide) == 1
        assert all("instances" in image for image in batch)


def test_training_loader_follows_the_sampler(images):
    loader = build_detection_train_loader(
        images,
        mapper=lambda entry: entry["image_id"],
        sampler=TrainingSampler(4, seed=5),
        total_batch_size=3,
        aspect_ratio_grouping=False,
        collate_fn=tuple,
    )
    order = first(TrainingSampler(4, seed=5), 6)
    assert first(loader, 2) == [tuple(order[:3]), tuple(order[3:])]


def test_batch_size_is_divided_among_processes(monkeypatch, images):
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 2)
    arguments = {"mapper": None, "sampler": SequentialSampler(images)}
    loader = build_detection_train_loader(
        images, total_batch_size=4, aspect_ratio_grouping=False, **arguments
    )
    assert [len(batch) for batch in loader] == [2, 2]
    with pytest.raises(AssertionError, match="3"):
        build_detection_train_loader(images, total_batch_size=3, **arguments)


def test_inference_loader_keeps_the_last_batch(images):
    loader = build_detection_test_loader(images, mapper=None, batch_size=3)
    assert len(loader) == 2
    assert [[image["image_id"] for image in batch] for batch in loader] == [[0, 1, 2], [3]]


def test_images_are_grouped_by_aspect_ratio():
    sizes = [(4, 3), (3, 4), (3, 3), (5, 1), (1, 5), (9, 2)]
    images = [{"width": w, "height": h, "id": k} for k, (w, h) in enumerate(sizes)]
    batches = list(AspectRatioGroupedDataset(images, 2))
    assert [[image["id"] for image in batch] for batch in batches] == [[1, 2], [0, 3]]
