"""Evaluation: the loop over a dataset, and COCO's average precision."""

import json
import logging
import math

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn


class Counter(DatasetEvaluator):
    def __init__(self, name):
        self.name = name

    def reset(self):
        self.outputs = []

    def process(self, inputs, outputs):
        self.outputs += outputs

    def evaluate(self):
        return {self.name: self.outputs}


class Model(nn.Module):
    def forward(self, batch):
        assert not self.training
        assert not torch.is_grad_enabled()
        return [sample * 2 for sample in batch]


def test_loop_over_a_dataset():
    model = Model().train()
    results = inference_on_dataset(model, [[1, 2], [3]], [Counter("a"), Counter("b")])
    assert results == {"a": [2, 4, 6], "b": [2, 4, 6]}
    assert model.training
    assert inference_on_dataset(model, [[1]], None) == {}
    assert inference_on_dataset(lambda batch: batch, [[1]], Counter("c")) == {"c": [1]}


def test_results_must_not_collide():
    evaluators = DatasetEvaluators([Counter("a"), Counter("a")])
    with pytest.raises(AssertionError, match="a"):
        inference_on_dataset(Model(), [[1]], evaluators)


def test_results_as_text(caplog):
    with caplog.at_level(logging.INFO):
        print_csv_format({"bbox": {"AP": 1.23456, "AP-person": 2.0, "AP50": 30.0}})
    assert [record.message for record in caplog.records] == [
        "copypaste: Task: bbox",
        "copypaste: AP,AP50",
        "copypaste: 1.2346,30.0000",
    ]
    assert flatten_results_dict({"bbox": {"AP": 1, "more": {"x": 2}}, "y": 3}) == {
        "bbox/AP": 1,
        "bbox/more/x": 2,
        "y": 3,
    }


@pytest.fixture
def dataset(tmp_path):
    """Two images; class ids 3 and 7; one object of class 7 is a crowd."""
    name = "test_evaluation_dataset"
    boxes = [(1, 3, [0, 0, 10, 10], 0), (1, 7, [20, 20, 50, 50], 0), (2, 3, [5, 5, 10, 10], 0)]
    boxes.append((2, 7, [0, 0, 100, 100], 1))
    annotations = [
        {"id": k, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": crowd}
        for k, (i, c, b, crowd) in enumerate(boxes, start=1)
    ]
    images = [{"id": k, "file_name": f"{k}.png", "width": 120, "height": 100} for k in (1, 2)]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    register_coco_instances(name, {}, str(tmp_path / "gt.json"), "")
    DatasetCatalog.get(name)  # sets the class names
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def evaluate(evaluator, predictions, **arguments):
    """predictions: {image id: [(box as corners, score, class), ...]}."""
    evaluator.reset()
    for image_id, found in predictions.items():
        instances = Instances((100, 120))
        instances.pred_boxes = Boxes(torch.tensor([row[0] for row in found]).reshape(-1, 4))
        instances.scores = torch.tensor([row[1] for row in found])
        instances.pred_classes = torch.tensor([row[2] for row in found], dtype=torch.int64)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate(**arguments)


PERFECT = {
    1: [([0.0, 0, 10, 10], 0.9, 0), ([20.0, 20, 70, 70], 0.8, 1)],
    2: [([5.0, 5, 15, 15], 0.7, 0)],
}


def test_perfect_predictions(dataset):
    results = evaluate(COCOEvaluator(dataset, distributed=False), PERFECT)["bbox"]
    # 100 pixels square are small, 2500 are medium; no object is large.
    assert math.isnan(results.pop("APl"))
    names = {"AP", "AP50", "AP75", "APs", "APm", "AP-cat", "AP-dog"}
    assert results == pytest.approx(dict.fromkeys(names, 100))


def test_average_precision_by_hand(dataset):
    # Cat: the better prediction is a false positive. The two true ones follow, so precision is
    # 1/2 and then 2/3; made monotonous 2/3 at every recall. Dog: found, AP 1.
    predictions = {
        1: [([60.0, 60, 70, 70], 0.95, 0), *PERFECT[1]],
        2: PERFECT[2],
    }
    results = evaluate(COCOEvaluator(dataset, distributed=False), predictions)["bbox"]
    assert results["AP-cat"] == pytest.approx(100 * 2 / 3)
    assert results["AP-dog"] == pytest.approx(100)
    assert results["AP"] == pytest.approx(100 * 5 / 6)


def test_overlap_thresholds(dataset):
    # The dog's box is shifted by 10 of 50 pixels: IoU 40 / 60 = 0.667, above 0.5 ... 0.65, which
    # are 4 of the 10 thresholds.
    predictions = {1: [([30.0, 20, 80, 70], 0.8, 1)], 2: []}
    results = evaluate(COCOEvaluator(dataset, distributed=False), predictions)["bbox"]
    assert results["AP-dog"] == pytest.approx(40)
    assert results["AP50"] == pytest.approx(50)  # no cat was found
    assert results["AP75"] == 0


def test_predictions_on_crowds_do_not_count(dataset):
    predictions = {1: PERFECT[1], 2: [*PERFECT[2], ([10.0, 10, 90, 90], 0.99, 1)]}
    results = evaluate(COCOEvaluator(dataset, distributed=False), predictions)["bbox"]
    assert results["AP-dog"] == pytest.approx(100)


def test_limit_of_detections(dataset):
    noise = [([90.0, 80, 100, 95.0], 0.95, 0)] * 11
    predictions = {1: [*noise, *PERFECT[1]], 2: PERFECT[2]}
    limited = COCOEvaluator(dataset, distributed=False, max_dets_per_image=11)
    results = evaluate(limited, predictions)["bbox"]
    # The cat of image 1 is below 11 false positives of its class and does not count, so recall
    # ends at 1/2 with precision 1/12: 51 of 101 recall points have 1/12, the others 0.
    assert results["AP-cat"] == pytest.approx(100 * 51 / 101 / 12)
    assert results["AP"] == pytest.approx((results["AP-cat"] + 100) / 2)


def test_files(dataset, tmp_path):
    out = tmp_path / "out"
    evaluate(COCOEvaluator(dataset, distributed=False, output_dir=str(out)), PERFECT)
    saved = json.loads((out / "coco_instances_results.json").read_text())
    assert len(saved) == 3
    assert saved[1]["image_id"] == 1
    assert saved[1]["category_id"] == 7  # as in the annotation file
    assert saved[1]["bbox"] == [20, 20, 50, 50]
    predictions = torch.load(out / "instances_predictions.pth", weights_only=True)
    assert [prediction["image_id"] for prediction in predictions] == [1, 2]


def test_nothing_predicted(dataset):
    evaluator = COCOEvaluator(dataset, distributed=False)
    assert evaluate(evaluator, {}) == {}
    results = evaluate(evaluator, {1: [], 2: []})["bbox"]
    assert list(results) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert all(math.isnan(value) for value in results.values())


def test_unknown_classes_are_reported(dataset):
    with pytest.raises(AssertionError, match="class"):
        evaluate(COCOEvaluator(dataset, distributed=False), {1: [([0.0, 0, 9, 9], 0.9, 2)]})


def test_inference_context_restores_the_mode():
    for training in (True, False):
        model = nn.Dropout().train(training)
        with inference_context(model):
            assert not model.training
        assert model.training is training


def test_other_datasets_are_converted(tmp_path):
    name = "test_evaluation_plain"
    box = {"bbox": [0, 0, 10, 10], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    entry = {"file_name": "a", "height": 20, "width": 20, "image_id": 1, "annotations": [box]}
    DatasetCatalog.register(name, lambda: [entry])
    MetadataCatalog.get(name).thing_classes = ["cat"]
    try:
        with pytest.raises(ValueError, match="output_dir"):
            COCOEvaluator(name)
        evaluator = COCOEvaluator(name, distributed=False, output_dir=str(tmp_path))
        results = evaluate(evaluator, {1: [([0.0, 0, 10, 10], 0.9, 0)]})["bbox"]
        assert results["AP"] == pytest.approx(100)
        assert (tmp_path / f"{name}_coco_format.json").exists()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
