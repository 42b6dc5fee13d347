#!/usr/bin/env python
"""Name what pictures show, with a backbone as it was trained on ImageNet.

    python tools/classify.py --config-file configs/backbones/dat_tiny.py \\
        --input street.jpg photos/ --weights dat_tiny.pth --top 5 --classes imagenet_classes.txt

So a published checkpoint can be tried out on its own terms before its backbone goes under a
detector. A picture is resized as the authors evaluate (shorter side 8/7 of the model's, bicubic,
the square in the middle). The table has the best classes of each picture with their probabilities.

Classes are numbers in the order of the model's outputs, from 0; --classes takes a file with their
names, one a line or as a list in JSON. No such file comes with this repository.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from efficient_detr.engine.classification import PictureClassifier, read_class_names
from efficient_detr.engine.commands import (
    NO_PICTURE_STATUS,
    picture_config,
    picture_parser,
    report_user_error,
    start_logging,
)
from efficient_detr.engine.predictor import picture_files, read_picture
from efficient_detr.errors import UserError

logger = logging.getLogger("efficient_detr.classify")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = picture_parser(__doc__)
    parser.add_argument("--weights", metavar="FILE", help="same as train.init_checkpoint=FILE")
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="classes to show of each picture"
    )
    parser.add_argument("--classes", metavar="FILE", help="names of the classes: .txt or .json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, 1 if no picture could be read, 2 after an error of the command line.
    """
    args = build_parser().parse_args(argv)
    start_logging()
    try:
        lines = classify(args)
    except UserError as error:
        return report_user_error(error)
    if not lines:
        return NO_PICTURE_STATUS
    print(
        tabulate(
            lines,
            headers=["picture", "class", "probability"],
            tablefmt="github",
            disable_numparse=True,
        )
    )
    return 0


def classify(args: argparse.Namespace) -> list[list[str]]:
    """Classify all pictures; returns the lines of the table."""
    if args.top < 1:
        raise UserError(f"--top {args.top}: show 1 class or more.")
    config = picture_config(args)
    files = picture_files(args.input)
    classifier = PictureClassifier(config, args.config_file)
    num_classes = classifier.model.num_classes
    names = read_class_names(args.classes, num_classes) if args.classes else None
    lines: list[list[str]] = []
    for file in tqdm(files, unit="picture", disable=None):
        image = None
        try:
            image = read_picture(file)
            probabilities = classifier(image)
        except UserError as error:
            # What concerns reading names the file already.
            logger.error("%s", error if image is None else f"{file} is left out: {error}")
            continue
        lines += best_classes(file, probabilities, args.top, names)
    return lines


def best_classes(
    file: str, probabilities: Tensor, number: int, names: Sequence[str] | None
) -> list[list[str]]:
    """Lines of the table about one picture; only the first names the file.

    Args:
        file: the picture.
        probabilities: (K,).
        number: lines at most.
        names: of the classes; None for their numbers.
    """
    best = probabilities.sort(descending=True, stable=True)
    found = list(zip(best.values.tolist(), best.indices.tolist(), strict=True))[:number]
    return [
        [
            file if rank == 0 else "",
            str(index) if names is None else names[index],
            f"{100 * probability:.2f} %",
        ]
        for rank, (probability, index) in enumerate(found)
    ]


if __name__ == "__main__":
    sys.exit(main())
