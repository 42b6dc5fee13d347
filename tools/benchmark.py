#!/usr/bin/env python
"""Time models stage by stage, in inference and in training, and measure their peak memory.

    python tools/benchmark.py --config-file configs/dino.py configs/focus_detr.py --threads 1 \\
        --json output/benchmark.json
    python tools/benchmark.py --config-file configs/detr.py configs/act_detr.py --device cuda \\
        --precision bf16 --batch-size 8 --training --rounds 15 --markdown

Models are those of the configs with random weights; images are random pixels, all of one size, and
each has random boxes for training. A training step is that of train_net.py, losses and clipping
included, with a learning rate of 0, so that every step does the same work.

All configs take turns in one process, starting with another one each round, so that a busy minute
of the machine hits all of them. Latency is the median of the rounds, the spread its distance from
the fastest, relative to it. The ratio compares medians with those of --baseline: on a CPU of
computing times of all threads, which hardly depend on other processes, on a GPU of latencies.

Stages are those of tools/analyze_model.py, and of a training step also the losses, the backward
pass and the optimizer with its clipping. Stages inside others (prediction heads in the decoder)
count once, as themselves. "Other" is the rest: normalising and padding images, scaling boxes...
The table of stages shows computing times on a CPU, latencies on a GPU; --json has both.
With --compile, each stage is compiled by itself, and stages inside others belong to these.

Peak memory is the increase over the loaded model and its images, in training with gradients and the
state of the optimizer: of the process, measured in one of its own, on a CPU; of tensors on a GPU.
A model that runs out of memory is left out with a message. After Ctrl-C, what has been measured is
shown and written.
"""

from __future__ import annotations

import os

# Read when torch is loaded: threads that spin while they wait spoil the times of those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import gc
import json
import sys
from collections.abc import MutableSequence, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_benchmark.command import (
    check_config_names,
    check_counts,
    check_device,
    check_writable,
    chosen_threads,
    report_interruption,
)
from kernel_benchmark.memory import in_own_process
from kernel_benchmark.model_report import as_json, stages_of, tables
from kernel_benchmark.passes import (
    INFERENCE,
    TRAINING,
    Batch,
    Contender,
    InferencePass,
    TrainingStep,
    draw_batch,
    make_timer,
)
from kernel_benchmark.report import describe_machine, save_json
from kernel_benchmark.stages import StopWatch, stop_watch_for
from kernel_benchmark.timing import round_robin
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from efficient_detr.engine.building import build_model
from efficient_detr.engine.checks import (
    check_arguments,
    check_operators,
    check_parts,
    load_config,
)
from efficient_detr.engine.commands import report_user_error
from efficient_detr.engine.trainer import AMP_DTYPES
from efficient_detr.errors import UserError

OUT_OF_MEMORY_STATUS = 1
PRECISIONS = {"fp32": None, "bf16": AMP_DTYPES["bfloat16"], "fp16": AMP_DTYPES["float16"]}


# Preparation -------------------------------------------------------------------------------------


def make_contenders(file: str, arguments: argparse.Namespace, watch: StopWatch) -> list[Contender]:
    """Build the model of a config and what is to be measured with it.

    Raises:
        UserError: if there is no such model, or it cannot be trained and should be.
    """
    config = load_config(file, arguments.opts)
    try:
        check_parts(config, ["model"])
        check_arguments(config)
        torch.manual_seed(0)
        model = build_model(config).to(torch.device(arguments.device))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if arguments.training:
        check_trainable(file, config, model)
    timer = make_timer(model, arguments.compile, watch)
    batch = make_batch(arguments, getattr(model, "num_classes", 1))
    precision = PRECISIONS[arguments.precision]
    works: dict[str, InferencePass | TrainingStep] = {
        INFERENCE: InferencePass(model, batch, precision)
    }
    if arguments.training:
        works[TRAINING] = TrainingStep(model, batch, precision, config, timer)
    setting = setting_of(arguments)
    return [Contender(file, kind, setting, work, timer) for kind, work in works.items()]


def make_batch(arguments: argparse.Namespace, num_classes: int) -> Batch:
    """The images, on the device.

    Raises:
        UserError: if there is not enough memory for them.
    """
    try:
        batch = draw_batch(arguments.image_size, arguments.batch_size, num_classes)
        for inputs in batch:
            inputs["image"] = inputs["image"].to(arguments.device)
    except (RuntimeError, TypeError) as error:  # the latter for numbers of too many digits
        height, width = arguments.image_size
        raise UserError(
            f"--image-size {height} {width} --batch-size {arguments.batch_size}: the images cannot "
            f"be made ({str(error).partition(chr(10))[0]})"
        ) from error
    return batch


def setting_of(arguments: argparse.Namespace) -> str:
    """What all contenders have in common."""
    height, width = arguments.image_size
    return (
        f"{arguments.batch_size} x {height}x{width} pixels in {arguments.precision} on "
        f"{arguments.device}"
    )


def check_trainable(file: str, config: DictConfig, model: nn.Module) -> None:
    """Refuse to train what has no losses or no optimizer."""
    lacking = "" if hasattr(model, "losses") else "its model has no losses"
    lacking = lacking or ("" if config.get("optimizer") else "it has no optimizer")
    if lacking:
        raise UserError(f"{file} cannot be trained: {lacking}; leave it out, or drop --training.")


# Measuring ---------------------------------------------------------------------------------------


def benchmark(arguments: argparse.Namespace, contenders: MutableSequence[Contender]) -> None:
    """Measure all configs.

    Args:
        arguments: the command line.
        contenders: gets those of all configs, which know their results.

    Raises:
        UserError: for arguments that cannot work, a config without a model or a model that cannot
            take the images.
    """
    check(arguments)
    watch = stop_watch_for(torch.device(arguments.device))
    for file in arguments.config_file:
        contenders += make_contenders(file, arguments, watch)
    turns = len(contenders) * (arguments.rounds + 1) + len(arguments.config_file)
    with tqdm(total=turns, unit="turn", smoothing=0, disable=None) as bar:
        for contender in contenders:  # what is loaded or compiled with the first pass
            bar.set_description(f"warm-up of {contender.name}")
            contender.warm_up()
            bar.update()
        check_stages(arguments.stages, contenders)
        time_all(contenders, arguments.rounds, bar)
        for file in arguments.config_file:
            bar.set_description(f"memory of {Path(file).stem}")
            measure_memory([one for one in contenders if one.file == file], arguments)
            bar.update()


def time_all(contenders: Sequence[Contender], rounds: int, bar: tqdm[Any]) -> None:
    """All rounds."""
    by_name = {f"{one.name} {one.kind}": one for one in contenders}
    gc.collect()
    for order in round_robin(list(by_name), rounds):
        for name in order:
            bar.set_description(name)
            by_name[name].take_turn()
            bar.update()


def measure_memory(contenders: Sequence[Contender], arguments: argparse.Namespace) -> None:
    """Peak memory of a config's contenders; on a CPU in a process of its own."""
    contenders = [one for one in contenders if not one.problem]
    if not contenders:
        return
    if arguments.device == "cuda":
        for contender in contenders:
            contender.measure_peak(torch.device("cuda"))
        return
    height, width = map(str, arguments.image_size)
    command = ["--only-memory", "--config-file", contenders[0].file]
    command += ["--image-size", height, width, "--batch-size", str(arguments.batch_size)]
    command += ["--precision", arguments.precision, "--threads", str(torch.get_num_threads())]
    command += ["--compile"] if arguments.compile else []
    command += ["--training"] if contenders[-1].kind == TRAINING else []
    command += ["--opts", *arguments.opts]
    what = f"{contenders[0].name} at {height}x{width}"
    try:
        found: dict[str, int | None] = in_own_process(__file__, command, what)
    except UserError as error:  # the times are worth keeping
        sys.stderr.write(f"\n{error}\n")
        return
    for contender in contenders:
        contender.peak_bytes = found[contender.kind]


def peaks_of_process(arguments: argparse.Namespace) -> dict[str, int | None]:
    """What the process that `measure_memory` starts does."""
    device = torch.device("cpu")
    found: dict[str, int | None] = {}
    for contender in make_contenders(arguments.config_file[0], arguments, stop_watch_for(device)):
        contender.warm_up()
        contender.measure_peak(device)
        found[contender.kind] = contender.peak_bytes
    return found


def check_stages(wanted: Sequence[str] | None, contenders: Sequence[Contender]) -> None:
    """Refuse names of stages that no contender has, once it is known what ran.

    Raises:
        UserError: naming the stage and those that there are.
    """
    there = stages_of(contenders)
    for name in wanted or ():
        if there and name not in there:
            raise UserError(f"--stages {name}: the stages of these configs are {', '.join(there)}.")


# The command -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, 1 if a model ran out of memory, 2 after an error that the user can put
        right, or 130 after Ctrl-C.
    """
    arguments = parse(argv)
    contenders: list[Contender] = []
    interrupted = False
    try:
        with chosen_threads(arguments.threads):
            if arguments.only_memory:
                print(json.dumps(peaks_of_process(arguments)))
                return 0
            try:
                benchmark(arguments, contenders)
            except KeyboardInterrupt:
                interrupted = True
            if not interrupted or any(one.samples for one in contenders):
                show(contenders, arguments)
    except UserError as error:
        return report_user_error(error)
    problems = [one.problem for one in contenders if one.problem]
    for problem in problems:
        sys.stderr.write(f"Left out: {problem}\n")
    if interrupted:
        return report_interruption()
    return OUT_OF_MEMORY_STATUS if problems else 0


def show(contenders: Sequence[Contender], arguments: argparse.Namespace) -> None:
    """Write and print what has been measured."""
    if arguments.json:
        save_json(as_json(contenders, arguments), arguments.json)
    print(describe(contenders, arguments) + "\n\n" + tables(contenders, arguments))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", nargs="+", required=True, metavar="FILE")
    parser.add_argument(
        "--image-size", nargs=2, type=int, default=[800, 1333], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile the stages")
    parser.add_argument("--training", action="store_true", help="measure training steps as well")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns a config")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as torch chooses")
    parser.add_argument(
        "--stages", nargs="+", metavar="STAGE", help="columns of the table; default: all"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="a config without its folder and .py; default: the first"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--markdown", action="store_true", help="print tables for documents")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="overrides, path.to.key=value"
    )
    arguments = parser.parse_args(argv)
    arguments.image_size = tuple(arguments.image_size)
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is built."""
    check_device(arguments.device)
    check_counts(arguments, ("batch_size", "rounds", "threads"))
    check_config_names(arguments.config_file)
    height, width = arguments.image_size
    if min(height, width) < 1:
        raise UserError(f"--image-size {height} {width}: give 1 pixel or more for each side.")
    stems = [Path(file).stem for file in arguments.config_file]
    if arguments.baseline not in (None, *stems):
        raise UserError(f"--baseline {arguments.baseline} is none of {', '.join(stems)}.")
    check_operators(torch.device(arguments.device))
    if arguments.json is not None:
        check_writable(arguments.json, "--json")


def describe(contenders: Sequence[Contender], arguments: argparse.Namespace) -> str:
    """One sentence about what was measured and where."""
    rounds = max(len(one.samples) for one in contenders)
    machine = describe_machine(torch.device(arguments.device))
    where = machine["cpu"] if arguments.device == "cpu" else machine["device"]
    return (
        f"{setting_of(arguments)}, {'compiled, ' if arguments.compile else ''}"
        f"{rounds} round{'s' * (rounds != 1)}, {where}, "
        f"CPU threads: {machine['threads']}, torch {machine['torch']}"
    )


if __name__ == "__main__":
    sys.exit(main())
