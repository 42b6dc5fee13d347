"""Evaluation of a model on a dataset."""

from detectron2._absent import absent_name_getter

from .coco_evaluation import COCOEvaluator
from .evaluator import DatasetEvaluator, DatasetEvaluators, inference_on_dataset
from .testing import print_csv_format

__getattr__ = absent_name_getter(__name__)
