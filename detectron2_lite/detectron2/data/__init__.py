"""Datasets, the mapping of their entries to model input, and loaders."""

from detectron2._absent import absent_name_getter

from . import transforms  # isort: skip
from .build import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from .catalog import DatasetCatalog, Metadata, MetadataCatalog
from .common import DatasetFromList, MapDataset
from .dataset_mapper import DatasetMapper

from . import datasets, detection_utils, samplers  # isort: skip  # datasets registers COCO

__getattr__ = absent_name_getter(__name__)
