"""Datasets, the mapping of their entries to model input, and loaders."""

from . import transforms  # isort: skip
from .build import (
    DatasetFromList,
    MapDataset,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from .catalog import DatasetCatalog, Metadata, MetadataCatalog
from .dataset_mapper import DatasetMapper

from . import datasets, detection_utils, samplers  # isort: skip  # datasets registers COCO
