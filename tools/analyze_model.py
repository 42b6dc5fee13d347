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
are measured in the pass that is counted, so give trained weights for them.

Without --num-inputs the input is one image of random pixels. With it, the inputs are the first
images of each config's test set, one at a time and resized as in its evaluation; the numbers are
means with the standard deviation over the images.

A model that cannot be built or counted is left out: its error comes last, after the others' table.
"""

import argparse
import gc
import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from kernel_benchmark.command import check_config_names, check_device, check_writable
from kernel_benchmark.report import save_json
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
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
from efficient_detr.evaluation import (
    FlopCount,
    ParameterCount,
    count_flops,
    count_parameters,
    describe_data,
)
from efficient_detr.evaluation.structure import describe_structure

GIGA = 1e9
MEGA = 1e6
TASKS = ("flop", "parameter", "activation", "structure")
TOTAL = "total"


@dataclass(frozen=True)
class Analysis:
    """What is known of one config.

    Attributes:
        name: stem of the config's file.
        counts: for each image; empty if nothing was asked that needs one.
        parameters: of the model.
        structure: its modules as text, or None if nobody asked.
        trained: whether it has weights from a file.
    """

    name: str
    counts: list[FlopCount]
    parameters: ParameterCount
    structure: str | None
    trained: bool

    def gflops(self) -> dict[str, list[float]]:
        """Billions of multiply-adds by stage, a value for each image; `TOTAL` comes last."""
        return _by_stage([count.stages for count in self.counts], GIGA)

    def activations(self) -> dict[str, list[float]]:
        """Activations by stage, a value for each image; `TOTAL` comes last."""
        return _by_stage([count.activations for count in self.counts], 1)

    def data(self) -> dict[str, float]:
        """What depends on the image, means over the images."""
        values: dict[str, list[float]] = defaultdict(list)
        for count in self.counts:
            for name, value in count.data.items():
                values[name].append(value)
        return {name: statistics.fmean(found) for name, found in values.items()}

    def uncounted(self) -> list[str]:
        """Operators without a count, by name."""
        return sorted({name for count in self.counts for name in count.uncounted})


def _by_stage(images: Sequence[Mapping[str, int]], unit: float) -> dict[str, list[float]]:
    names = _in_order(images)
    stages = {name: [image.get(name, 0) / unit for image in images] for name in names}
    return stages | {TOTAL: [sum(image.values()) / unit for image in images]}


def _in_order(lists: Iterable[Iterable[str]]) -> list[str]:
    """All names, where each list says what comes after what."""
    ordered: list[str] = []
    for names in lists:
        place = 0
        for name in names:
            if name not in ordered:
                ordered.insert(place, name)
            place = ordered.index(name) + 1
    return ordered


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["flop", "parameter"])
    parser.add_argument(
        "--image-size", nargs=2, type=int, default=[800, 1333], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--num-inputs", type=int, metavar="N", help="images of the test set")
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
        The exit status: 0, or 2 after an error that the user can put right.
    """
    args = build_parser().parse_args(argv)
    try:
        configs = checked_configs(args)
    except UserError as error:
        return report_user_error(error)
    analyses: list[Analysis] = []
    errors: list[UserError] = []
    for file, config in configs.items():
        try:
            analyses.append(analyze(file, config, args))
        except UserError as error:
            errors.append(UserError(f"{file} is left out: {error}"))
        gc.collect()  # modules with hooks are cycles, and the next model needs the memory
    if analyses:
        print(report(analyses, args))
        if args.json:
            save_json(as_json(analyses, args), args.json)
    return [0, *map(report_user_error, errors)][-1]


def checked_configs(args: argparse.Namespace) -> dict[str, DictConfig]:
    """Everything that can be wrong is found before the first model is built.

    Returns:
        File -> config.

    Raises:
        UserError: naming the option or the file.
    """
    if min(args.image_size) < 1:
        size = " ".join(map(str, args.image_size))
        raise UserError(f"--image-size {size}: give 1 pixel or more for each side.")
    if args.num_inputs is not None and args.num_inputs < 1:
        raise UserError(f"--num-inputs {args.num_inputs}: give 1 image or more.")
    check_config_names(args.config_file)
    check_device(args.device)
    check_operators(torch.device(args.device))
    if args.json:
        check_writable(args.json, "--json")
    configs = {file: load_config(file, args.opts) for file in args.config_file}
    for file, config in configs.items():
        try:
            check_parts(config, ["model"])
            check_arguments(config)
            check_init_checkpoint(config)
            if args.num_inputs:
                check_test_set(config)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    return configs


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
        images = test_images(config, args.num_inputs) if args.num_inputs else [random_image(args)]
        bar = tqdm(images, Path(file).stem, args.num_inputs or 1, unit="image", disable=None)
        counts = [counted(model, image) for image in bar]
    return Analysis(
        name=Path(file).stem,
        counts=counts,
        parameters=count_parameters(model),
        structure=describe_structure(model) if "structure" in args.tasks else None,
        trained=bool(checkpoint),
    )


def random_image(args: argparse.Namespace) -> dict[str, Any]:
    """One of Detectron2's input dictionaries, with random pixels."""
    return {"image": torch.randint(256, (3, *args.image_size), dtype=torch.uint8)}


def test_images(config: DictConfig, number: int) -> Iterator[Mapping[str, Any]]:
    """The first images of the test set, resized as in the evaluation."""
    batches = instantiate(config.dataloader.test)
    return itertools.islice(itertools.chain.from_iterable(batches), number)


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


def report(analyses: Sequence[Analysis], args: argparse.Namespace) -> str:
    """All that was asked for, as text."""
    parts = [f"{_inputs(args)}\n\n{overview(analyses, args.tasks)}"]
    if "parameter" in args.tasks:
        rows = {one.name: _millions(one.parameters) for one in analyses}
        parts.append(f"Parameters (M) by stage\n\n{stage_table(rows)}")
    if "activation" in args.tasks:
        rows = {one.name: _divided(one.activations(), MEGA) for one in analyses}
        parts.append(f"Activations (M) by stage\n\n{stage_table(rows)}")
    counted_ones = [one for one in analyses if one.counts]
    if counted_ones:
        data = {one.name: describe_data(one.data()) for one in counted_ones}
        operators = {
            one.name: ", ".join(name.removeprefix("aten::") for name in one.uncounted())
            for one in counted_ones
        }
        parts.append(_merged("Depends on the image, mean", data))
        parts.append(_merged("Operators seen, not counted", operators))
    untrained = [one.name for one in counted_ones if _is_clustered(one) and not one.trained]
    if untrained:
        parts.append(
            f"Clusters of random weights mean little ({', '.join(untrained)}): give trained ones "
            "with --opts train.init_checkpoint=FILE."
        )
    parts += [f"{one.name}\n{one.structure}" for one in analyses if one.structure]
    return "\n\n".join(parts)


def _inputs(args: argparse.Namespace) -> str:
    if args.num_inputs:
        return f"Means over the first {args.num_inputs} images of the test set"
    height, width = args.image_size
    return f"One image of {height} x {width} pixels"


def overview(analyses: Sequence[Analysis], tasks: Sequence[str]) -> str:
    """The table of all configs: GFLOPs by stage, and the totals of what else was asked for."""
    rows: dict[str, dict[str, list[float]]] = {one.name: {} for one in analyses}
    for one in analyses:
        row = rows[one.name]
        if "flop" in tasks:
            stages = one.gflops()
            row |= {"GFLOPs" if name == TOTAL else name: found for name, found in stages.items()}
        if "parameter" in tasks:
            found = _millions(one.parameters)
            row |= {"parameters (M)": found[TOTAL], "trainable (M)": found["trainable"]}
        if "activation" in tasks:
            row["activations (M)"] = _divided(one.activations(), MEGA)[TOTAL]
    return stage_table(rows)


def stage_table(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A row a config and a column a stage that is anything in any of them."""
    columns = [
        column
        for column in _in_order(rows.values())
        if any(_cell(row.get(column, ())).strip("0.") for row in rows.values())
    ]
    lines = [
        [name, *(_cell(row.get(column, ())) for column in columns)] for name, row in rows.items()
    ]
    alignment = ("left", *["right"] * len(columns))
    return tabulate(
        lines, ["config", *columns], tablefmt="pipe", colalign=alignment, disable_numparse=True
    )


def _cell(values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several values; nothing for zero."""
    if not any(values):
        return ""
    mean = statistics.fmean(values)
    decimals = 2 if mean >= 1 else 4
    if len(values) < 2:
        return f"{mean:.{decimals}f}"
    return f"{mean:.{decimals}f} ± {statistics.stdev(values):.{decimals}f}"


def _divided(stages: Mapping[str, Sequence[float]], unit: float) -> dict[str, list[float]]:
    return {name: [value / unit for value in values] for name, values in stages.items()}


def _millions(parameters: ParameterCount) -> dict[str, list[float]]:
    stages = {name: [number / MEGA] for name, number in parameters.stages.items()}
    total, trainable = parameters.total / MEGA, parameters.trainable / MEGA
    return stages | {TOTAL: [total], "trainable": [trainable]}


def _merged(title: str, texts: Mapping[str, str]) -> str:
    """Lines of text about configs, those of equal text together."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, text in texts.items():
        names[text].append(name)
    lines = [f"  {', '.join(group)}: {text or 'none'}" for text, group in names.items()]
    return "\n".join([f"{title}:", *lines])


def _is_clustered(one: Analysis) -> bool:
    return any(name.startswith("dense-") for name in one.data())


def as_json(analyses: Sequence[Analysis], args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of all configs by name: GFLOPs, elements, and what depends on the image."""
    return {
        "image_size": None if args.num_inputs else list(args.image_size),
        "inputs": max(len(one.counts) for one in analyses),
        "configs": {one.name: _entry(one, args.tasks) for one in analyses},
    }


def _entry(one: Analysis, tasks: Sequence[str]) -> dict[str, Any]:
    parameters = one.parameters
    entry: dict[str, Any] = {
        "parameters": {
            TOTAL: parameters.total,
            "trainable": parameters.trainable,
            "stages": parameters.stages,
        }
    }
    if "flop" in tasks:
        gflops = one.gflops()
        entry["gflops"] = {name: statistics.fmean(values) for name, values in gflops.items()}
        if len(one.counts) > 1:
            spread = {name: statistics.stdev(values) for name, values in gflops.items()}
            entry["gflops_spread"] = spread
    if "activation" in tasks:
        found = one.activations()
        entry["activations"] = {name: statistics.fmean(values) for name, values in found.items()}
    if one.counts:
        entry |= {"inputs": len(one.counts), "data": one.data(), "uncounted": one.uncounted()}
    return entry


if __name__ == "__main__":
    sys.exit(main())
