"""The visualizer: what it draws and where."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.colormap import colormap, random_color
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image

GREY = np.full((60, 90, 3), 100, np.uint8)


@pytest.fixture
def metadata():
    name = "test_visualizer_dataset"
    yield MetadataCatalog.get(name).set(
        thing_classes=["cat", "dog"], thing_colors=[[255, 0, 0], [0, 255, 0]]
    )
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


def test_class_colours(metadata):
    found = Instances((60, 90), pred_boxes=Boxes([[5, 5, 50, 50]]), pred_classes=torch.tensor([1]))
    visualizer = Visualizer(GREY, metadata, instance_mode=ColorMode.SEGMENTATION)
    drawing = visualizer.draw_instance_predictions(found, jittering=False)
    assert drawing.ax.patches[0].get_edgecolor()[:3] == (0, 1, 0)


@pytest.mark.parametrize("kind", ["polygon", "bitmap"])
def test_masks_are_filled(kind):
    mask = np.zeros((60, 90), bool)
    mask[10:30, 20:60] = True
    polygon = [np.array([20.0, 10, 60, 10, 60, 30, 20, 30])]
    masks = [polygon] if kind == "polygon" else [mask]
    drawing = Visualizer(GREY).overlay_instances(masks=masks, assigned_colors=[(1.0, 0, 0)])
    red = drawing.get_image()[15:25, 25:55]
    assert (red[..., 0] > 150).all()
    assert (red[..., 1] < 100).all()
    assert np.abs(np.subtract(changed(drawing), (20, 10, 60, 30))).max() <= 2


def test_black_and_white_keeps_masked_colours():
    image = np.zeros((60, 90, 3), np.uint8)
    image[..., 0] = 240
    found = Instances((60, 90), pred_masks=torch.zeros(1, 60, 90, dtype=torch.bool))
    found.pred_masks[0, :30] = True
    drawing = Visualizer(image, instance_mode=ColorMode.IMAGE_BW).draw_instance_predictions(found)
    pixels = drawing.get_image().astype(int)
    assert pixels[50, 80].tolist() == [80, 80, 80]  # the mean of 240, 0 and 0
    assert pixels[10, 40, 0] > pixels[10, 40, 1:].max()


def test_lengths_must_agree():
    with pytest.raises(AssertionError):
        Visualizer(GREY).overlay_instances(boxes=np.zeros((2, 4)), labels=["one"])


def test_colours():
    rgb, bgr = colormap(rgb=True, maximum=1), colormap(maximum=255)
    assert np.allclose(rgb * 255, bgr[:, ::-1])
    assert rgb.shape == (74, 3)
    assert rgb.min() == 0
    assert rgb.max() == 1
    np.random.seed(3)
    color = random_color(rgb=True, maximum=1)
    np.random.seed(3)
    assert np.array_equal(color, rgb[np.random.randint(len(rgb))])
