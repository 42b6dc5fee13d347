#!/usr/bin/env python
"""Count multiply-adds and parameters of models, stage by stage, on a random image.

    python tools/analyze_model.py --config-file configs/dino.py configs/focus_detr.py \\
        --image-size 800 1333

The models have random weights: what a model costs does not depend on them, except for the order in
which tokens are kept. One multiply-add counts as 1 FLOP, as in the papers.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from efficient_detr.engine.building import build_model
from efficient_detr.engine.checks import (
    check_arguments,
    check_operators,
    check_parts,
    load_config,
)
from efficient_detr.engine.commands import report_user_error
from efficient_detr.errors import UserError
from efficient_detr.evaluation import count_flops, count_parameters, describe_cost


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, or 2 after an error that the user can put right.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", nargs="+", required=True, metavar="FILE")
    parser.add_argument(
        "--image-size", nargs=2, type=int, default=[800, 1333], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="overrides, path.to.key=value"
    )
    args = parser.parse_args(argv)
    try:
        for config_file in args.config_file:
            height, width = args.image_size
            print(f"\n{config_file} at {height}x{width}")
            print(analyze(config_file, args.opts, height, width))
    except UserError as error:
        return report_user_error(error)
    return 0


def analyze(config_file: str, overrides: Sequence[str], height: int, width: int) -> str:
    """Build the model of a config and describe its cost on one image of the given size.

    Raises:
        UserError: if there is no such model, or it cannot take images of this size.
    """
    if min(height, width) < 1:
        raise UserError(f"--image-size {height} {width}: give 1 pixel or more for each side.")
    config = load_config(config_file, overrides)
    check_parts(config, ["model"])
    check_arguments(config)
    check_operators(torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(config).eval()
    image = {"image": torch.randint(256, (3, height, width), dtype=torch.uint8)}
    try:
        cost = count_flops(model, [image])
    # A map that is smaller than a convolution's kernel.
    except ValueError as error:
        raise UserError(
            f"The model of {config_file} cannot take images of {height} x {width} pixels "
            f"(--image-size): {error}"
        ) from error
    return describe_cost([cost], count_parameters(model))


if __name__ == "__main__":
    sys.exit(main())
