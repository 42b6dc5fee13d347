"""Own data in COCO format, with the same augmentations; the command line gives the files.

    dataloader.train.dataset.json_file=cells/train.json
    dataloader.train.dataset.image_root=cells/train
    dataloader.test.dataset.json_file=cells/val.json
    dataloader.test.dataset.image_root=cells/val
    model.num_classes=3

The class count is compared with the categories of the files before training starts.
"""

from .coco_detr import dataloader

for _split in ("train", "test"):
    _dataset = dataloader[_split].dataset
    _dataset.names = f"custom_{_split}"
    # "???" is a value that must be given.
    _dataset.json_file = "???"
    _dataset.image_root = "???"
