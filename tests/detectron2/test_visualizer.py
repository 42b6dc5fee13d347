"""The visualizer: what it draws and where."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image

GREY = np.full((60, 90, 3), 100, np.uint8)


@pytest.fixture
def metadata():
    name = "test_visualizer_dataset"
    yield MetadataCatalog.get(name).set(thing_classes=["cat", "dog"])
    MetadataCatalog.remove(name)


def changed(drawing, image=GREY):
    """Bounding box (x0, y0, x1, y1) of all pixels that differ from the image."""
    rows, columns = np.nonzero((drawing.get_image() != image).any(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def labels_of(visualizer):
    return [text.get_text() for text in visualizer.get_output().ax.texts]


def test_an_empty_drawing_is_the_image():
    image = np.random.randint(0, 256, (31, 47, 3), dtype=np.uint8)
    assert np.array_equal(Visualizer(image).get_output().get_image(), image)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_scale(scale, tmp_path):
    output = Visualizer(GREY, scale=scale).get_output()
    assert output.get_image().shape == (60 * scale, 90 * scale, 3)
    output.save(str(tmp_path / "a.png"))
    assert Image.open(tmp_path / "a.png").size == (90 * scale, 60 * scale)


def test_box_is_drawn_where_it_is():
    drawing = Visualizer(GREY).overlay_instances(boxes=np.array([[20.0, 10, 70, 50]]))
    assert np.abs(np.subtract(changed(drawing), (20, 10, 70, 50))).max() <= 3


def test_predictions(metadata):
    found = Instances((60, 90), scores=torch.tensor([0.956, 0.4]))
    found.pred_boxes = Boxes([[5, 5, 20, 20], [1, 1, 80, 50]])
    found.pred_classes = torch.tensor([1, 0])
    visualizer = Visualizer(GREY, metadata)
    visualizer.draw_instance_predictions(found)
    assert labels_of(visualizer) == ["cat 40%", "dog 96%"]  # the larger one first
    empty = Instances((60, 90), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    drawing = Visualizer(GREY, metadata).draw_instance_predictions(empty)
    assert np.array_equal(drawing.get_image(), GREY)


def test_annotations(metadata):
    boxes = [[5, 5, 40, 30], [50, 10, 20, 40]]
    objects = [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": k, "iscrowd": k}
        for k, box in enumerate(boxes)
    ]
    visualizer = Visualizer(GREY, metadata)
    visualizer.draw_dataset_dict({"annotations": objects})
    assert labels_of(visualizer) == ["cat", "dog|crowd"]
    assert np.array_equal(Visualizer(GREY).draw_dataset_dict({}).get_image(), GREY)


def test_numbers_stand_in_for_unknown_classes():
    visualizer = Visualizer(GREY)
    found = Instances((60, 90), pred_boxes=Boxes([[5, 5, 20, 20]]), pred_classes=torch.tensor([4]))
    visualizer.draw_instance_predictions(found)
    assert labels_of(visualizer) == ["4"]


def test_black_and_white():
    image = np.zeros((60, 90, 3), np.uint8)
    image[..., 0] = 240
    found = Instances((60, 90), pred_boxes=Boxes([[5, 5, 20, 20]]))
    drawing = Visualizer(image, instance_mode=ColorMode.IMAGE_BW).draw_instance_predictions(found)
    assert drawing.get_image()[50, 80].tolist() == [80, 80, 80]  # the mean of 240, 0 and 0


def test_lengths_must_agree():
    with pytest.raises(AssertionError):
        Visualizer(GREY).overlay_instances(boxes=np.zeros((2, 4)), labels=["one"])
