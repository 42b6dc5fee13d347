"""Average precision of boxes as COCO defines it, through pycocotools."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import _open_silently, convert_to_coco_json
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from .evaluator import DatasetEvaluator

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_logger = logging.getLogger(__name__)


class COCOEvaluator(DatasetEvaluator):
    """AP of predicted boxes on a dataset with, or converted to, a COCO annotation file."""

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
        """Open the annotations.

        Args:
            dataset_name: a registered dataset. Without ``json_file`` in its metadata it is
                converted to ``output_dir``/NAME_coco_format.json.
            tasks: only ``bbox`` is known here.
            distributed: gather predictions from all processes; otherwise evaluate one's own.
            output_dir: where to write ``instances_predictions.pth`` and, in COCO's result
                format, ``coco_instances_results.json``.
            max_dets_per_image: the most confident detections that count, default 100.
            use_fast_impl: has no effect: pycocotools is always used.
            kpt_oks_sigmas: must be empty here.
            allow_cached_coco: keep a converted file of an earlier run.

        Raises:
            NotImplementedError: another task than ``bbox`` is asked for.
            ValueError: a conversion is needed, but ``output_dir`` is None.
        """
        if set(tasks or ()) - {"bbox"} or len(kpt_oks_sigmas):
            raise NotImplementedError(
                f"evaluation of {tasks} is not in detectron2_lite; install the real Detectron2"
            )
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_dets = [1, 10, 100 if max_dets_per_image is None else max_dets_per_image]
        self._metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):
            if output_dir is None:
                raise ValueError(
                    f"dataset '{dataset_name}' is not in COCO's format; give COCOEvaluator an "
                    "output_dir for its conversion"
                )
            json_file = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
            convert_to_coco_json(dataset_name, json_file, allow_cached=allow_cached_coco)
            self._metadata.json_file = json_file
        self._coco_api = _open_silently(PathManager.get_local_path(self._metadata.json_file))
        self._do_evaluation = "annotations" in self._coco_api.dataset
        self._predictions: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take predictions.

        Args:
            inputs: images with ``image_id``.
            outputs: for each image a dictionary with ``instances`` that have ``pred_boxes``,
                ``scores`` and ``pred_classes``; others are ignored.
        """
        for image, output in zip(inputs, outputs):
            if "instances" in output:
                found = instances_to_coco_json(output["instances"].to("cpu"), image["image_id"])
                self._predictions.append({"image_id": image["image_id"], "instances": found})

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Score all predictions.

        Args:
            img_ids: images to evaluate, default all of the annotation file.

        Returns:
            {"bbox": metrics in percent}: AP, AP50, AP75, APs, APm, APl and AP-CLASS for each
            class, nan where there is no such object. Empty outside the main process, without
            predictions, and without annotations.

        Raises:
            AssertionError: a predicted class does not exist.
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
        results = copy.deepcopy(list(itertools.chain(*(p["instances"] for p in predictions))))
        self._restore_category_ids(results)
        self._write(predictions, results)
        if not self._do_evaluation:
            _logger.info("The annotation file has no annotations; nothing is evaluated")
            return {}
        return {"bbox": self._average_precision(results, img_ids)}

    def _write(self, predictions: list[Any], results: list[Any]) -> None:
        if not self._output_dir:
            return
        PathManager.mkdirs(self._output_dir)
        path = os.path.join(self._output_dir, "instances_predictions.pth")
        with PathManager.open(path, "wb") as file:
            torch.save(predictions, file)
        path = os.path.join(self._output_dir, "coco_instances_results.json")
        with PathManager.open(path, "w") as file:
            file.write(json.dumps(results))
        _logger.info("Saved predictions to %s", path)

    def _restore_category_ids(self, results: list[dict[str, Any]]) -> None:
        """Replace contiguous class ids by those of the annotation file, in place."""
        id_map = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if id_map is None:
            return
        original = {contiguous: category_id for category_id, contiguous in id_map.items()}
        assert sorted(original) == list(range(len(id_map))), f"class ids are not 0 ... K-1: {id_map}"
        for result in results:
            predicted = result["category_id"]
            assert predicted in original, (
                f"class {predicted} was predicted for image {result['image_id']}, but dataset "
                f"'{self._metadata.name}' has only {len(original)} classes"
            )
            result["category_id"] = original[predicted]

    def _average_precision(
        self, results: list[dict[str, Any]], img_ids: Sequence[int] | None
    ) -> dict[str, float]:
        if not results:
            _logger.warning("No object was predicted in any image")
            return dict.fromkeys(_METRICS, float("nan"))
        evaluation = _AnyLimitCOCOeval(self._coco_api, self._coco_api.loadRes(results), "bbox")
        evaluation.params.maxDets = self._max_dets
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats = zip(_METRICS, evaluation.stats)
        metrics = {name: float(s * 100) if s >= 0 else float("nan") for name, s in stats}
        _logger.info("Results for bbox (nan: no such object):\n%s", create_small_table(metrics))
        classes = self._metadata.get("thing_classes") or ()
        if len(classes) > 1:
            metrics.update(_per_class(evaluation.eval["precision"], classes))
        return metrics


class _AnyLimitCOCOeval(COCOeval):
    """COCOeval whose AP uses the last of ``params.maxDets``; the original one insists on 100."""

    def summarize(self) -> None:
        """Fill ``stats`` with the twelve numbers of COCO, and print them as COCOeval does."""
        limits = self.params.maxDets
        areas = ("small", "medium", "large")
        rows: list[tuple[str, float | None, str, int]] = [
            ("precision", None, "all", limits[-1]),
            ("precision", 0.5, "all", limits[-1]),
            ("precision", 0.75, "all", limits[-1]),
            *(("precision", None, area, limits[-1]) for area in areas),
            *(("recall", None, "all", limit) for limit in limits),
            *(("recall", None, area, limits[-1]) for area in areas),
        ]
        self.stats = np.array([self._mean(*row) for row in rows])

    def _mean(self, kind: str, iou: float | None, area: str, limit: int) -> float:
        values = self.eval[kind]  # (IoU, recall, class, area, limit), or without recall
        if iou is not None:
            values = values[np.isclose(self.params.iouThrs, iou)]
        values = values[..., self.params.areaRngLbl.index(area), self.params.maxDets.index(limit)]
        values = values[values > -1]
        mean = float(values.mean()) if values.size else -1.0
        text = "0.50:0.95" if iou is None else f"{iou:.2f}"
        name = "Average Precision  (AP)" if kind == "precision" else "Average Recall     (AR)"
        print(f" {name} @[ IoU={text:<9} | area={area:>6} | maxDets={limit:>3} ] = {mean:0.3f}")
        return mean


def _per_class(precision: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """AP of each class over all areas, from precisions (IoU, recall, class, area, limit)."""
    assert precision.shape[2] == len(class_names), "the annotation file has other classes"
    rows = []
    for index, name in enumerate(class_names):
        valid = precision[:, :, index, 0, -1]
        valid = valid[valid > -1]
        rows.append((name, float(np.mean(valid) * 100) if valid.size else float("nan")))
    columns = min(6, 2 * len(rows))
    cells = list(itertools.chain(*rows))
    table = tabulate(
        itertools.zip_longest(*(cells[start::columns] for start in range(columns))),
        headers=["category", "AP"] * (columns // 2),
        tablefmt="pipe",
        floatfmt=".3f",
        numalign="left",
    )
    _logger.info("AP of each class:\n%s", table)
    return {f"AP-{name}": ap for name, ap in rows}


def instances_to_coco_json(instances: Instances, img_id: int) -> list[dict[str, Any]]:
    """Predictions of one image in COCO's result format: boxes become (x, y, width, height)."""
    if len(instances) == 0:
        return []
    if instances.has("pred_masks") or instances.has("pred_keypoints"):
        raise NotImplementedError(
            "masks and keypoints are not in detectron2_lite; install the real Detectron2"
        )
    boxes = instances.pred_boxes.tensor
    boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    columns = zip(instances.pred_classes.tolist(), boxes, instances.scores.tolist())
    return [
        {"image_id": img_id, "category_id": category, "bbox": box, "score": score}
        for category, box, score in columns
    ]
