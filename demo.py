#!/usr/bin/env python
"""Detect objects in pictures and draw the boxes.

python demo.py --config-file configs/focus_detr.py --input street.jpg photos/*.png \\
    --output detections --confidence-threshold 0.5 --opts train.init_checkpoint=model_final.pth
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig
from tqdm import tqdm

from efficient_detr.engine.checks import (
    check_device,
    check_init_checkpoint,
    check_num_classes,
    check_parts,
    dataset_names,
    load_config,
)
from efficient_detr.engine.commands import (
    NO_PICTURE_STATUS,
    PARTS_OF_PICTURES,
    TRAIN_OPTIONS_OF_PICTURES,
    picture_parser,
    report_user_error,
    start_logging,
)
from efficient_detr.engine.predictor import Predictor, output_paths, picture_files, save_picture
from efficient_detr.errors import UserError

logger = logging.getLogger("efficient_detr.demo")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = picture_parser(__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, help="draw boxes from this score on"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, 1 if no picture could be handled, 2 after an error of the command line.
    """
    args = build_parser().parse_args(argv)
    start_logging()
    try:
        done = _detect(args)
    except UserError as error:
        return report_user_error(error)
    return 0 if done else NO_PICTURE_STATUS


def _detect(args: argparse.Namespace) -> int:
    """Handle all pictures; return how many could be."""
    cfg = load_config(args.config_file, args.opts)
    check_parts(cfg, PARTS_OF_PICTURES, TRAIN_OPTIONS_OF_PICTURES)
    check_device(cfg, 1)
    check_init_checkpoint(cfg)
    _check_classes(cfg)
    files = picture_files(args.input)
    predictor = Predictor(cfg, args.config_file)
    done = 0
    pairs = zip(files, output_paths(files, args.output), strict=True)
    for source, target in tqdm(pairs, total=len(files), unit="picture", disable=None):
        try:
            count = _detect_in(source, target, predictor, args.confidence_threshold)
        except UserError as error:
            logger.error("%s", error)
            continue
        logger.info("%s: %d detections -> %s", source, count, target)
        done += 1
    logger.info("%d of %d pictures done", done, len(files))
    return done


def _detect_in(source: str, target: str, predictor: Predictor, threshold: float) -> int:
    """Handle one picture; return the number of boxes. Errors name the picture."""
    image = predictor.read(source)
    try:
        instances = predictor(image)
    except UserError as error:
        raise UserError(f"{source} is left out: {error}") from error
    kept = instances[instances.scores >= threshold]
    save_picture(predictor.draw(image, kept), target)
    return len(kept)


def _check_classes(cfg: DictConfig) -> None:
    """Compare the model with its test set where that tells its classes without any file."""
    for name in dataset_names(cfg, "test"):
        if MetadataCatalog.get(name).get("thing_classes") is not None:
            check_num_classes(cfg, name)


if __name__ == "__main__":
    sys.exit(main())
