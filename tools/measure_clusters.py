#!/usr/bin/env python
"""Measure, layer by layer on your images, how many clusters ACT makes and how exact they are.

    python tools/measure_clusters.py --config-file configs/act_detr.py --input images/ \\
        --rounds 8 16 20 24 32 --widths 4 8 --output output/clusters \\
        --opts train.init_checkpoint=detr_dc5.pth

Each line of the table is the mean over the images: tokens N and clusters C of the queries of an
encoder layer (mean over heads), C / N, and the error of the attention's output against dense
attention. Dense attention runs meanwhile, so that each layer is judged by itself. docs/act.md says
how to choose by these numbers.

With --output, the folder gets clusters.json and clusters.csv (every image by itself), curves.png,
and clusters.png: the clusters of --layer and --head, hashed as the config says, over some images.
Without weights the numbers mean little, because the number of clusters depends on the queries.
"""

import argparse
import csv
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from efficient_detr.engine.commands import (
    NO_PICTURE_STATUS,
    picture_config,
    picture_parser,
    report_user_error,
    start_logging,
)
from efficient_detr.engine.predictor import Predictor, picture_files
from efficient_detr.errors import UserError
from efficient_detr.evaluation.clusters import (
    ClusterMeasurement,
    Hashing,
    mean_measurements,
    measuring_clusters,
)
from efficient_detr.files import replaced_file
from efficient_detr.visualization.clusters import (
    ClusterExample,
    ClusterRecorder,
    save_cluster_curves,
    save_clusters,
)

logger = logging.getLogger("efficient_detr.measure_clusters")

SHOWN_IMAGES = 4
Found = dict[str, list[ClusterMeasurement]]  # by file


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = picture_parser(__doc__)
    parser.add_argument("--weights", metavar="FILE", help="same as train.init_checkpoint=FILE")
    parser.add_argument("--rounds", nargs="+", type=int, default=[8, 16, 20, 24, 32], metavar="L")
    parser.add_argument("--widths", nargs="+", type=float, default=[8.0], metavar="r")
    parser.add_argument(
        "--bias",
        choices=["published", "theory"],
        default="published",
        help="hash biases up to 1 (published) or up to the width (theory)",
    )
    parser.add_argument("--maps", action="store_true", help="compare attention weights as well")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for files and pictures")
    parser.add_argument("--layer", type=int, default=0, help="of clusters.png, from 0")
    parser.add_argument("--head", type=int, default=0, help="of clusters.png, from 0")
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
        found = measure(args)
    except UserError as error:
        return report_user_error(error)
    if not found:
        return NO_PICTURE_STATUS
    print(table(found))
    return 0


def measure(args: argparse.Namespace) -> Found:
    """Measure all pictures and write the files."""
    hashings = chosen_hashings(args)
    config = picture_config(args)
    files = picture_files(args.input)
    if args.output:
        make_folder(args.output)
    predictor = Predictor(config, args.config_file)
    recorder = ClusterRecorder(predictor.model, args.layer, args.head)
    if not config.train.init_checkpoint:
        logger.warning("No weights are given: figures of untrained weights mean little.")
    found: Found = {}
    examples: list[ClusterExample] = []
    for file in tqdm(files, unit="picture", disable=None):
        try:
            image = predictor.read(file)
            found[file] = measure_image(predictor, image, file, hashings, recorder, args.maps)
        except UserError as error:
            logger.error("%s", error)
            continue
        if len(examples) < SHOWN_IMAGES:
            examples.append(recorder.example(image))
        if args.output:
            save(found, args.output)
    if args.output and found:
        save_cluster_curves(all_of(found), args.output / "curves.png")
        save_clusters(examples, args.output / "clusters.png")
    return found


def measure_image(
    predictor: Predictor,
    image: np.ndarray,
    file: str,
    hashings: Sequence[Hashing],
    recorder: ClusterRecorder,
    maps: bool,
) -> list[ClusterMeasurement]:
    """Measure one picture. Errors name it."""
    measuring = measuring_clusters(predictor.model, hashings, attention_maps=maps)
    try:
        with measuring as measurements, recorder:
            predictor(image)
    except UserError as error:
        raise UserError(f"{file} is left out: {error}") from error
    return measurements


def chosen_hashings(args: argparse.Namespace) -> list[Hashing]:
    """Every pair of rounds and width."""
    if min(args.rounds) < 1:
        raise UserError(f"--rounds must be at least 1, but are {args.rounds}.")
    if not all(1e-6 <= width <= 1e6 for width in args.widths):
        raise UserError(f"--widths must lie between 1e-6 and 1e6, but are {args.widths}.")
    return [
        Hashing(rounds, width, 1.0 if args.bias == "published" else width)
        for width in args.widths
        for rounds in args.rounds
    ]


def make_folder(folder: Path) -> None:
    """Make the folder for the results."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be made: {error.strerror or error}.") from error


def all_of(found: Found) -> list[ClusterMeasurement]:
    """The measurements of all pictures."""
    return [one for measurements in found.values() for one in measurements]


def save(found: Found, folder: Path) -> None:
    """Write what has been measured so far, every picture by itself."""
    rows: list[dict[str, Any]] = [
        {"file": file, **one.as_row()} for file, measured in found.items() for one in measured
    ]
    with replaced_file(folder / "clusters.json") as path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    with replaced_file(folder / "clusters.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(found: Found) -> str:
    """The means over the pictures."""
    lines = []
    for mean in mean_measurements(all_of(found)):
        hashing = mean.hashing
        line = [mean.layer, hashing.rounds, f"{hashing.width:g}", f"{mean.tokens:.0f}"]
        line += [f"{mean.clusters:.0f}", f"{mean.ratio:.2f}", f"{mean.error:.3f}"]
        line += [] if mean.map_error is None else [f"{mean.map_error:.1e}"]
        lines.append(line)
    headers = ["layer", "rounds", "width", "tokens", "clusters", "C/N", "error", "MSE of weights"]
    return tabulate(
        lines, headers=headers[: len(lines[0])], tablefmt="github", disable_numparse=True
    )


if __name__ == "__main__":
    sys.exit(main())
