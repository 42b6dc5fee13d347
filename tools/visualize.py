#!/usr/bin/env python
"""Draw what a model sees in your images; a subcommand for each kind of picture.

    python tools/visualize.py sampling-points --config-file configs/backbones/dat_tiny.py \\
        --input street.jpg --weights dat_tiny.pth --output output/pictures \\
        --stage 2 --block -1 --query 0.4 0.6 --query 0.7 0.3

`python tools/visualize.py COMMAND --help` tells what a command draws. Of street.jpg the one above
makes street_sampling_points.png.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from efficient_detr.data.seeding import temporary_seed
from efficient_detr.engine.classification import PictureClassifier
from efficient_detr.engine.commands import (
    NO_PICTURE_STATUS,
    picture_config,
    picture_parser,
    report_user_error,
    start_logging,
)
from efficient_detr.engine.predictor import Predictor, output_paths, picture_files, read_picture
from efficient_detr.errors import UserError
from efficient_detr.visualization.sampling_points import save_sampling_points
from efficient_detr.visualization.sampling_recorder import (
    SamplingRecorder,
    check_deformable_block,
    check_fractions,
    deformable_blocks_of_config,
)

logger = logging.getLogger("efficient_detr.visualize")

SAMPLING_POINTS = """Draw where the deformable attention of DAT or DAT++ samples its keys.

Of one block: the reference grid with a line from each of its points to where every group moved it,
and for each --query the points by the attention that they get from there. Any model with a DAT can
be drawn: a detector, or a classifier of configs/backbones.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    points = add_command(
        commands, "sampling-points", "deformed keys of DAT", SAMPLING_POINTS, draw_sampling_points
    )
    points.add_argument("--stage", type=int, default=2, help="0 to 3")
    points.add_argument("--block", type=int, default=-1, help="negative from the stage's last")
    points.add_argument(
        "--query",
        nargs=2,
        type=float,
        action="append",
        metavar=("X", "Y"),
        help="fractions of the image's width and height, for a classifier of those of the square "
        "that it cuts out of the middle; may be repeated (default: the middle)",
    )
    points.add_argument("--group", type=int, help="show the points of this group only, from 0")
    points.add_argument("--head", type=int, help="weights of this head, from 0 (default: the mean)")
    return parser


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    description: str,
    draw: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """A subcommand with the arguments that all share.

    Args:
        commands: where it is added.
        name: of the command.
        summary: its line in the list of commands.
        description: the text of its ``--help``.
        draw: makes the pictures and returns how many.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        parents=[picture_parser(None)],
        conflict_handler="resolve",  # of both --help
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", metavar="FILE", help="same as train.init_checkpoint=FILE")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures")
    parser.set_defaults(draw=draw)
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
        drawn = args.draw(args)
    except UserError as error:
        return report_user_error(error)
    return 0 if drawn else NO_PICTURE_STATUS


def draw_sampling_points(args: argparse.Namespace) -> int:
    """Draw the sampling points on every image; returns the number of pictures."""
    queries = [(x, y) for x, y in args.query or [(0.5, 0.5)]]
    check_fractions(queries)
    config = picture_config(args)
    blocks = deformable_blocks_of_config(config.model)
    if blocks is not None:
        check_deformable_block(blocks, args.stage, args.block)
    files, paths = pictures(args)
    predictor = build_predictor(config)
    recorder = SamplingRecorder(
        predictor.model, args.stage, args.block, group=args.group, head=args.head
    )

    def draw(image: np.ndarray, path: Path) -> None:
        with recorder:
            predictor(image)
        example = recorder.example(queries)
        with reported_writing(path):
            save_sampling_points([example], path)

    return for_each_picture(files, paths, draw)


# What the commands share -------------------------------------------------------------------------


def pictures(args: argparse.Namespace) -> tuple[list[str], list[Path]]:
    """The images, and where the picture of each goes."""
    files = picture_files(args.input)
    ending = f"_{args.command.replace('-', '_')}.png"
    named = [Path(file).with_name(f"{Path(file).stem}{ending}") for file in files]
    return files, [Path(path) for path in output_paths([str(path) for path in named], args.output)]


def build_predictor(config: DictConfig) -> Predictor | PictureClassifier:
    """The model with its weights and the resizing of its images."""
    if not config.train.init_checkpoint:
        logger.warning("No weights are given: pictures of untrained weights say little.")
    with temporary_seed(0):  # random weights shall give the same picture again
        return PictureClassifier(config) if "preprocessing" in config else Predictor(config)


@contextmanager
def reported_writing(path: Path) -> Iterator[None]:
    """Turn the error of a file that cannot be written into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def for_each_picture(
    files: Sequence[str], paths: Sequence[Path], draw: Callable[[np.ndarray, Path], None]
) -> int:
    """Draw image after image; one that fails is reported and left out. Returns the number drawn."""
    drawn = 0
    for file, path in zip(tqdm(files, unit="picture", disable=None), paths, strict=True):
        image = None
        try:
            image = read_picture(file)
            draw(image, path)
        except UserError as error:
            # What concerns reading names the file already.
            logger.error("%s", error if image is None else f"{file} is left out: {error}")
            continue
        logger.info("%s", path)
        drawn += 1
    return drawn


if __name__ == "__main__":
    sys.exit(main())
