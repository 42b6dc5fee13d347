"""Average precision of boxes as COCO defines it, through pycocotools."""

import copy
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2._absent import absence_message
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json, open_coco_file
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from .evaluator import DatasetEvaluator

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_logger = logging.getLogger(__name__)


class COCOEvaluator(DatasetEvaluator):
    """AP of predicted boxes on a dataset with, or converted to, a COCO annotation file.

    ``output_dir`` gets ``instances_predictions.pth``, ``coco_instances_results.json`` and, for a
    dataset without ``json_file`` in its metadata, ``NAME_coco_format.json`` (ValueError without
    ``output_dir``), of an earlier run if ``allow_cached_coco``. Tasks other than ``bbox`` raise
    NotImplementedError. ``use_fast_impl`` has no effect: pycocotools is always used.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
    ) -> None:
        if set(tasks or ()) - {"bbox"} or kpt_oks_sigmas:
            raise NotImplementedError(absence_message(f"evaluation of {tasks or 'keypoints'}"))
        self._distributed, self._output_dir = distributed, output_dir
        self._max_dets = [1, 10, 100 if max_dets_per_image is None else max_dets_per_image]
        self._metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):
            if output_dir is None:
                raise ValueError(f"dataset '{dataset_name}' needs conversion: give an output_dir")
            json_file = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
            convert_to_coco_json(dataset_name, json_file, allow_cached=allow_cached_coco)
            self._metadata.json_file = json_file
        self._coco_api = open_coco_file(self._metadata.json_file)
        self._predictions: list[dict[str, Any]] = []

    def reset(self) -> None:
        self._predictions = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take ``pred_boxes``, ``scores`` and ``pred_classes`` of images with ``image_id``."""
        for image, output in zip(inputs, outputs, strict=True):
            found = instances_to_coco_json(output["instances"].to("cpu"), image["image_id"])
            self._predictions.append({"image_id": image["image_id"], "instances": found})

    def evaluate(self) -> dict[str, dict[str, float]]:
        """{"bbox": metrics in percent}, nan where there is no such object.

        Empty outside the main process, without predictions, and without annotations.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
            if not comm.is_main_process():
                return {}
        if not predictions:
            _logger.warning("COCOEvaluator received no predictions")
            return {}
        # The processes' own lists keep contiguous class ids, so that evaluate() can be repeated.
        results = copy.deepcopy([r for image in predictions for r in image["instances"]])
        self._restore_category_ids(results)
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            path = os.path.join(self._output_dir, "instances_predictions.pth")
            with PathManager.open(path, "wb") as file:
                torch.save(predictions, file)
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with PathManager.open(path, "w") as file:
                file.write(json.dumps(results))
        if "annotations" not in self._coco_api.dataset:
            _logger.info("The annotation file has no annotations; nothing is evaluated")
            return {}
        return {"bbox": self._average_precision(results)}

    def _restore_category_ids(self, results: list[dict[str, Any]]) -> None:
        """Replace contiguous class ids by those of the annotation file, in place."""
        id_map = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        original = {contiguous: category_id for category_id, contiguous in id_map.items()}
        for result in results if original else ():
            predicted, name = result["category_id"], self._metadata.name
            assert predicted in original, f"'{name}' has no class {predicted}, which was predicted"
            result["category_id"] = original[predicted]

    def _average_precision(self, results: list[dict[str, Any]]) -> dict[str, float]:
        if not results:
            _logger.warning("No object was predicted in any image")
            return dict.fromkeys(_METRICS, float("nan"))
        evaluation = COCOeval(self._coco_api, self._coco_api.loadRes(results), "bbox")
        evaluation.params.maxDets = self._max_dets
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        # (IoU, recall, class) over all areas; COCOeval's own AP knows no limit other than 100.
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        others = [100 * float(s) if s >= 0 else float("nan") for s in evaluation.stats[1:6]]
        metrics = dict(zip(_METRICS, [_mean_percent(precision), *others], strict=True))
        classes = self._metadata.get("thing_classes") or ()
        if len(classes) > 1:
            assert precision.shape[2] == len(classes), "the annotation file has other classes"
            for index, name in enumerate(classes):
                metrics[f"AP-{name}"] = _mean_percent(precision[:, :, index])
        table = tabulate(metrics.items(), headers=("bbox", "%"), tablefmt="pipe", floatfmt=".3f")
        _logger.info("Results (nan: no such object):\n%s", table)
        return metrics


def _mean_percent(precision: np.ndarray) -> float:
    """Mean of what is not -1 ("no such object"), in percent; nan if nothing is left."""
    valid = precision[precision > -1]
    return 100 * float(np.mean(valid)) if valid.size else float("nan")


def instances_to_coco_json(instances: Instances, img_id: int) -> list[dict[str, Any]]:
    """Predictions of one image in COCO's result format: boxes become (x, y, width, height)."""
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    columns = (instances.pred_classes.tolist(), boxes.tolist(), instances.scores.tolist())
    return [
        {"image_id": img_id, "category_id": category, "bbox": box, "score": score}
        for category, box, score in zip(*columns, strict=True)
    ]
