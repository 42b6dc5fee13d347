#!/usr/bin/env python
"""Count what models cost, stage by stage: multiply-adds, parameters and activations.

    python tools/analyze_model.py --config-file configs/dino.py configs/focus_detr.py \\
        --tasks flop parameter activation structure --image-size 800 1333
    python tools/analyze_model.py --config-file configs/act_detr.py --num-inputs 100 \\
        --json output/analysis.json --opts train.init_checkpoint=detr_dc5.pth

One table for all configs. One multiply-add counts as 1 FLOP, as in the papers; activations are the
outputs of convolutions and matrix products. A stage pays for what it runs, and the heads that the
decoder runs are a stage beside it. Below the table stand the operators that nobody counts and what
depends on the image: tokens that each encoder layer updates, clusters of clustered attention. These
are measured in the pass that is counted, so give trained weights for them. Clustered attention pads
all heads to the one with most clusters, and what is computed is what counts: "clusters" is the mean
over the heads, GFLOPs follow from "most-clusters".

Without --num-inputs the input is one image of random pixels. With it, the inputs are the first
images of each config's test set, one at a time and resized as in its evaluation; the numbers are
means with the standard deviation over the images.

A config that cannot be loaded, built or counted is left out: its error comes last, after the table
of the others. After Ctrl-C the table has the configs that were finished; --json grows with each.
"""

import argparse
import gc
import itertools
import sys
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from kernel_benchmark.analysis_report import Analysis, as_json, report
from kernel_benchmark.command import (
    check_config_names,
    check_device,
    check_writable,
    report_interruption,
)
from kernel_benchmark.report import save_json
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from efficient_detr.engine.building import build_checkpointer, build_model
from efficient_detr.engine.checks import (
    check_arguments,
    check_dataset,
    check_init_checkpoint,
    check_operators,
    check_parts,
    load_config,
)
from efficient_detr.engine.commands import report_user_error
from efficient_detr.errors import UserError
from efficient_detr.evaluation import FlopCount, count_flops, count_parameters
from efficient_detr.evaluation.structure import describe_structure

TASKS = ("flop", "parameter", "activation", "structure")
DEFAULT_SIZE = (800, 1333)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["flop", "parameter"])
    parser.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        default=DEFAULT_SIZE,
        metavar=("HEIGHT", "WIDTH"),
        help=f"of random pixels; default: {DEFAULT_SIZE[0]} {DEFAULT_SIZE[1]}",
    )
    parser.add_argument(
        "--num-inputs", type=int, metavar="N", help="images of the test set, instead of random ones"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="overrides, path.to.key=value"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, 2 after an error that the user can put right, or 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    analyses: list[Analysis] = []
    errors: list[UserError] = []
    interrupted = False
    try:
        analyze_all(args, analyses, errors)
    except UserError as error:
        return report_user_error(error)
    except KeyboardInterrupt:
        interrupted = True
    if analyses:
        print(report(analyses, args))
    status = [0, *map(report_user_error, errors)][-1]
    return report_interruption() if interrupted else status


def analyze_all(
    args: argparse.Namespace,
    analyses: MutableSequence[Analysis],
    errors: MutableSequence[UserError],
) -> None:
    """Analyze all configs, one after the other, and write the file anew after each.

    Args:
        args: the command line.
        analyses: gets one for each config.
        errors: gets one for each config that is left out.

    Raises:
        UserError: about the command line, before the first model is built.
    """
    check_options(args)
    configs: dict[str, DictConfig] = {}
    for file in args.config_file:
        try:
            configs[file] = load_config(file, args.opts)
        except UserError as error:
            errors.append(UserError(f"{file} is left out: {error}"))
    for file, config in configs.items():
        check_config(file, config, args)
    for file, config in configs.items():
        try:
            analyses.append(analyze(file, config, args))
        except UserError as error:
            errors.append(UserError(f"{file} is left out: {error}"))
        else:
            if args.json:
                save_json(as_json(analyses, args), args.json)
        gc.collect()  # modules with hooks are cycles, and the next model needs the memory


def check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot work for any config.

    Raises:
        UserError: naming the option or a file that is not there.
    """
    # The very same tuple only if the option was not given.
    if args.image_size is not DEFAULT_SIZE and args.num_inputs is not None:
        raise UserError(
            "--image-size and --num-inputs exclude each other, because images of the test set are "
            "resized as in the evaluation: leave one of the two out."
        )
    if min(args.image_size) < 1:
        size = " ".join(map(str, args.image_size))
        raise UserError(f"--image-size {size}: give 1 pixel or more for each side.")
    if args.num_inputs is not None and args.num_inputs < 1:
        raise UserError(f"--num-inputs {args.num_inputs}: give 1 image or more.")
    check_config_names(args.config_file)
    for file in args.config_file:
        if not Path(file).is_file():
            raise UserError(f"The config file {file} does not exist: check --config-file.")
    check_device(args.device)
    check_operators(torch.device(args.device))
    if args.json:
        check_writable(args.json, "--json")


def check_config(file: str, config: DictConfig, args: argparse.Namespace) -> None:
    """Refuse a config that was loaded but has not what is needed.

    Raises:
        UserError: naming the file.
    """
    try:
        check_parts(config, ["model"])
        check_arguments(config)
        check_init_checkpoint(config)
        if args.num_inputs:
            check_test_set(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def check_test_set(config: DictConfig) -> None:
    """Check that the config names a test set and that its files are there."""
    if OmegaConf.select(config, "dataloader.test") is None:
        raise UserError("It has no dataloader.test to take --num-inputs from: leave them out.")
    check_dataset(config, "test")


def analyze(file: str, config: DictConfig, args: argparse.Namespace) -> Analysis:
    """Build the model of a config and count.

    Raises:
        UserError: if it cannot be built, loaded or counted.
    """
    torch.manual_seed(0)
    try:
        model = build_model(config)
    # A constructor may find anything wrong with its arguments.
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"its model cannot be built: {error}") from error
    checkpoint = OmegaConf.select(config, "train.init_checkpoint")
    if checkpoint:
        build_checkpointer(config, model, file).load(checkpoint)
    model.to(args.device).eval()
    counts: list[FlopCount] = []
    if {"flop", "activation"} & set(args.tasks):
        number = args.num_inputs or 1
        images = test_images(config, number) if args.num_inputs else [random_image(args)]
        bar = tqdm(images, Path(file).stem, number, unit="image", disable=None)
        counts = [counted(model, image) for image in bar]
        if not counts:
            raise UserError("its test set has no images to take --num-inputs from")
    return Analysis(
        name=Path(file).stem,
        counts=counts,
        parameters=count_parameters(model),
        structure=describe_structure(model) if "structure" in args.tasks else None,
        checkpoint=str(checkpoint) if checkpoint else None,
    )


def random_image(args: argparse.Namespace) -> dict[str, Any]:
    """One of Detectron2's input dictionaries, with random pixels.

    Raises:
        UserError: if there is not enough memory for it.
    """
    height, width = args.image_size
    try:
        return {"image": torch.randint(256, (3, height, width), dtype=torch.uint8)}
    except (RuntimeError, TypeError) as error:  # the latter for numbers of too many digits
        raise UserError(
            f"--image-size {height} {width}: the image cannot be made "
            f"({str(error).partition(chr(10))[0]})"
        ) from error


def test_images(config: DictConfig, number: int) -> Iterator[Mapping[str, Any]]:
    """The first images of the test set, resized as in the evaluation.

    Raises:
        UserError: if they cannot be read.
    """
    try:
        batches = instantiate(config.dataloader.test)
        yield from itertools.islice(itertools.chain.from_iterable(batches), number)
    except UserError:
        raise
    # Pictures and mappers are the user's.
    except Exception as error:
        raise UserError(
            f"its test set cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def counted(model: nn.Module, image: Mapping[str, Any]) -> FlopCount:
    """Count one image.

    Raises:
        UserError: if the model cannot take it or cannot be traced.
    """
    try:
        return count_flops(model, [image])
    # Whatever a model or the tracer may raise must not cost the other models' numbers.
    except Exception as error:
        height, width = image["image"].shape[-2:]
        raise UserError(
            f"its model cannot take images of {height} x {width} pixels, or cannot be traced "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
