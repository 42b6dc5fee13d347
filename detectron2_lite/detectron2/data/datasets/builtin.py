"""Registers COCO under ``$DETECTRON2_DATASETS``, by default the folder ``datasets``."""

import os

from .coco import register_coco_instances

# Ids in COCO's files, and names; the contiguous ids are the positions in this list.
_CATEGORIES = """
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat, 10 traffic
light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat, 18 dog, 19 horse,
20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack, 28 umbrella, 31 handbag,
32 tie, 33 suitcase, 34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40
baseball glove, 41 skateboard, 42 surfboard, 43 tennis racket, 44 bottle, 46 wine glass, 47 cup, 48
fork, 49 knife, 50 spoon, 51 bowl, 52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57
carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair, 63 couch, 64 potted plant, 65 bed, 67
dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone, 78
microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 84 book, 85 clock, 86 vase, 87 scissors,
88 teddy bear, 89 hair drier, 90 toothbrush
"""
# Name of the dataset: folder of the images and name of the annotation file.
_SPLITS = {
    "coco_2014_train": ("train2014", "instances_train2014"),
    "coco_2014_val": ("val2014", "instances_val2014"),
    "coco_2014_minival": ("val2014", "instances_minival2014"),
    "coco_2017_train": ("train2017", "instances_train2017"),
    "coco_2017_val": ("val2017", "instances_val2017"),
    "coco_2017_test": ("test2017", "image_info_test2017"),
    "coco_2017_test-dev": ("test2017", "image_info_test-dev2017"),
    "coco_2017_val_100": ("val2017", "instances_val2017_100"),
}


def register_all_coco(root: str) -> None:
    """Register the splits of COCO below ``root``/coco; the files need not exist yet."""
    rows = [row.split(maxsplit=1) for row in " ".join(_CATEGORIES.split()).split(", ")]
    metadata = {
        "thing_dataset_id_to_contiguous_id": {int(row[0]): i for i, row in enumerate(rows)},
        "thing_classes": [name for _, name in rows],
    }
    for name, (images, annotations) in _SPLITS.items():
        json_file = os.path.join(root, "coco/annotations", annotations + ".json")
        register_coco_instances(name, metadata, json_file, os.path.join(root, "coco", images))


register_all_coco(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
