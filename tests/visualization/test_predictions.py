import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from matplotlib.figure import Figure
from PIL import Image

from efficient_detr.visualization.figures import class_colours, enlarge, save_figure
from efficient_detr.visualization.predictions import (
    DetectionExample,
    detection_example,
    draw_boxes,
    predictions_figure,
    save_predictions,
)

NAMES = ["cat", "dog", "owl"]


def example(scores=(0.9, 0.3), name="a"):
    return DetectionExample(
        image=np.zeros((100, 80, 3), dtype=np.uint8),
        true_boxes=np.array([[10.0, 10.0, 40.0, 50.0]]),
        true_classes=np.array([1]),
        boxes=np.array([[12.0, 10.0, 40.0, 50.0], [50.0, 60.0, 70.0, 90.0]]),
        classes=np.array([1, 2]),
        scores=np.array(scores),
        name=name,
    )


def close_to(picture, colour):
    """Where a picture has about a colour (0 to 1)."""
    return np.abs(picture.astype(float) - 255 * np.asarray(colour)).max(axis=2) < 40


class TestClassColours:
    def test_colours_differ(self):
        colours = np.array(class_colours(20))
        assert colours.shape == (20, 3)
        assert colours.min() >= 0
        assert colours.max() <= 1
        distances = np.abs(colours[:, None] - colours[None]).max(axis=2)
        assert distances[~np.eye(20, dtype=bool)].min() > 0.04

    def test_a_class_keeps_its_colour_when_there_are_more(self):
        assert class_colours(3) == class_colours(80)[:3]


class TestEnlarge:
    def test_the_longer_side_is_met_and_the_ratio_kept(self):
        assert enlarge(np.zeros((50, 100, 3), dtype=np.uint8), 360).shape == (180, 360, 3)
        assert enlarge(np.zeros((900, 300, 3), dtype=np.uint8), 360).shape == (360, 120, 3)


class TestDrawBoxes:
    def test_edges_lie_where_the_box_is_in_the_colour_of_its_class(self):
        """A box from (25, 50) to (75, 100) of 100 x 200 pixels, drawn at twice the size."""
        image = np.zeros((200, 100, 3), dtype=np.uint8)
        box = np.array([[25.0, 50.0, 75.0, 100.0]])
        picture = draw_boxes(image, box, [2], NAMES, longer_side=400)
        assert picture.shape == (400, 200, 3)
        drawn = close_to(picture, class_colours(3)[2])
        # The label hangs below the upper left corner, so the other edges are looked at.
        assert drawn[150, 147:154].any()  # right edge at x = 150
        assert drawn[197:204, 120].any()  # lower edge at y = 200
        assert not drawn[:, :40].any()
        assert not drawn[:, 160:].any()
        assert not drawn[210:].any()

    def test_the_image_shows_where_nothing_is_drawn(self):
        image = np.full((60, 60, 3), 77, dtype=np.uint8)
        picture = draw_boxes(image, np.zeros((0, 4)), [], NAMES, longer_side=120)
        np.testing.assert_array_equal(picture, np.full((120, 120, 3), 77))

    def test_scores_make_longer_labels(self):
        image = np.full((200, 200, 3), 255, dtype=np.uint8)
        box = np.array([[50.0, 50.0, 150.0, 150.0]])
        without = draw_boxes(image, box, [0], NAMES)
        with_scores = draw_boxes(image, box, [0], NAMES, [0.87])
        dark = [(picture.max(axis=2) < 100).sum() for picture in (without, with_scores)]
        assert dark[1] > 1.5 * dark[0]  # the dark ground of the label

    @pytest.mark.parametrize("box", [[70.0, 0.0, 99.0, 20.0], [0.0, 90.0, 20.0, 99.0]])
    def test_labels_stay_inside_the_picture(self, box):
        image = np.full((100, 100, 3), 255, dtype=np.uint8)
        picture = draw_boxes(image, np.array([box]), [0], ["zebra"], [0.5], longer_side=400)
        ground = picture.max(axis=2) < 60
        assert ground.any()
        assert not ground[:, -1].any()
        assert not ground[-1].any()


class TestExample:
    def test_record_and_prediction_become_boxes_in_pixels(self, tmp_path):
        path = tmp_path / "street.png"
        Image.new("RGB", (40, 30), (1, 2, 3)).save(path)
        record = {
            "file_name": str(path),
            "annotations": [
                {"bbox": [5, 6, 10, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2},
                {
                    "bbox": [0, 0, 9, 9],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": 0,
                    "iscrowd": 1,
                },
            ],
        }
        prediction = Instances((30, 40))
        prediction.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        prediction.scores = torch.tensor([0.5])
        prediction.pred_classes = torch.tensor([1])
        made = detection_example(record, prediction)
        np.testing.assert_array_equal(made.image[0, 0], [1, 2, 3])
        np.testing.assert_array_equal(made.true_boxes, [[5, 6, 15, 26]])
        np.testing.assert_array_equal(made.true_classes, [2])
        np.testing.assert_array_equal(made.boxes, [[1, 2, 3, 4]])
        assert made.name == "street"

    def test_an_image_without_objects(self, tmp_path):
        path = tmp_path / "empty.png"
        Image.new("RGB", (40, 30)).save(path)
        prediction = Instances((30, 40))
        prediction.pred_boxes = Boxes(torch.zeros(0, 4))
        prediction.scores = torch.zeros(0)
        prediction.pred_classes = torch.zeros(0, dtype=torch.long)
        made = detection_example({"file_name": str(path), "annotations": []}, prediction)
        assert made.true_boxes.shape == made.boxes.shape == (0, 4)


class TestFigure:
    def panels(self, figure):
        return {a.get_title(): np.asarray(a.images[0].get_array()) for a in figure.axes if a.images}

    def test_pairs_stand_side_by_side(self):
        figure = predictions_figure([example(name=n) for n in "abcd"], NAMES)
        titles = [axis.get_title() for axis in figure.axes if axis.images]
        expected = [t for n in "abcd" for t in (f"{n}  ground truth", "prediction")]
        assert titles == expected
        tops = [axis.get_position().y0 for axis in figure.axes if axis.images]
        assert len(set(np.round(tops, 6))) == 2  # three pairs in the first row, one in the second

    def test_unlikely_predictions_are_not_drawn(self):
        owl = class_colours(3)[2]
        panels = self.panels(predictions_figure([example(scores=(0.9, 0.3))], NAMES))
        assert not close_to(panels["prediction"], owl).any()
        panels = self.panels(predictions_figure([example(scores=(0.9, 0.6))], NAMES))
        assert close_to(panels["prediction"], owl).any()
        assert not close_to(panels["a  ground truth"], owl).any()

    def test_the_file_is_a_picture(self, tmp_path):
        path = save_predictions([example()], NAMES, tmp_path / "new" / "predictions.png")
        with Image.open(path) as picture:
            assert picture.format == "PNG"
        assert [file.name for file in path.parent.iterdir()] == ["predictions.png"]


class TestSaveFigure:
    def test_a_failure_keeps_the_old_picture_and_leaves_no_other_file(self, tmp_path, monkeypatch):
        path = save_figure(Figure(figsize=(1, 1)), tmp_path / "picture.png")
        before = path.read_bytes()

        def fail(self, file, **options):
            file.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(Figure, "savefig", fail)
        with pytest.raises(OSError, match="disk full"):
            save_figure(Figure(figsize=(2, 2)), path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
