"""The 80 object categories of COCO: ids in its files, names and drawing colours."""

from typing import Any

from detectron2._absent import absence_message

# Id, name and RGB colour (hexadecimal).
_TABLE = """
1 person dc143c, 2 bicycle 770b20, 3 car 00008e, 4 motorcycle 0000e6, 5 airplane 6a00e4,
6 bus 003c64, 7 train 005064, 8 truck 000046, 9 boat 0000c0, 10 traffic light faaa1e,
11 fire hydrant 64aa1e, 13 stop sign dcdc00, 14 parking meter af74af, 15 bench fa001e,
16 bird a52a2a, 17 cat ff4dff, 18 dog 00e2fc, 19 horse b6b6ff, 20 sheep 005200, 21 cow 78a69d,
22 elephant 6e4c00, 23 bear ae39ff, 24 zebra c76400, 25 giraffe 480076, 27 backpack ffb3f0,
28 umbrella 007d5c, 31 handbag d10097, 32 tie bcd0b6, 33 suitcase 00dcb0, 34 frisbee ff63a4,
35 skis 5c0049, 36 snowboard 8581ff, 37 sports ball 4eb4ff, 38 kite 00e400,
39 baseball bat aefff3, 40 baseball glove 2d59ff, 41 skateboard 868667, 42 surfboard 9194ae,
43 tennis racket ffd0ba, 44 bottle c5e2ff, 46 wine glass ab8601, 47 cup 6d3f36, 48 fork cf8aff,
49 knife 97005f, 50 spoon 09503d, 51 bowl 546933, 52 banana 4a4169, 53 apple a6c466,
54 sandwich d0c3d2, 55 orange ff6d41, 56 broccoli 008f95, 57 carrot b300c2, 58 hot dog d1636a,
59 pizza 057900, 60 donut e3ffcd, 61 cake 93bad0, 62 chair 994501, 63 couch 035fa1,
64 potted plant a3ff00, 65 bed 7700aa, 67 dining table 00b6c7, 70 toilet 00a578, 72 tv b78258,
73 laptop 5f2000, 74 mouse 827287, 75 remote 6e8185, 76 keyboard a64a76, 77 cell phone db8eb9,
78 microwave 4fd272, 79 oven b25a3e, 80 toaster 41460f, 81 sink 7fa773, 82 refrigerator 3b696a,
84 book 8e6c2d, 85 clock c4ac00, 86 vase 5f3650, 87 scissors 804cff, 88 teddy bear c93901,
89 hair drier f6007a, 90 toothbrush bfa2d0
"""


def _parse(row: str) -> dict[str, Any]:
    number, *words, color = row.split()
    head = {"color": list(bytes.fromhex(color)), "isthing": 1}
    return {**head, "id": int(number), "name": " ".join(words)}


COCO_CATEGORIES = [_parse(row) for row in _TABLE.split(",")]


def _get_builtin_metadata(dataset_name: str) -> dict[str, Any]:
    """Metadata of ``coco``: class names, colours, and ids in files to contiguous ids."""
    if dataset_name != "coco":
        raise KeyError(absence_message(f"The description of the dataset '{dataset_name}'"))
    id_map = {category["id"]: index for index, category in enumerate(COCO_CATEGORIES)}
    columns = {key: [category[key] for category in COCO_CATEGORIES] for key in ("name", "color")}
    metadata = {"thing_classes": columns["name"], "thing_colors": columns["color"]}
    return {"thing_dataset_id_to_contiguous_id": id_map, **metadata}
