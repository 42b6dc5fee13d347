#!/usr/bin/env python
"""Time backbones stage by stage, and measure their peak memory.

    python tools/bench_backbones.py --threads 1 --json output/backbones.json
    python tools/bench_backbones.py --device cuda --training --rounds 15 --markdown

Backbones are those of the configs, with random weights and one random image. "Stem" is all before
the first block; a stage's merging counts with the stage. "Whole" is one call of the backbone, with
the norms of its outputs. With --training the gradients of all parameters are part of the work.

Deformable attention of large maps takes its queries in chunks of at most `max_logits` logits; where
that makes more than one chunk, there is a line "at once" beside the line "in chunks". In training,
chunks are recomputed in the backward pass.

All parts of all backbones take turns, and each counts with its fastest turn; on a CPU that is
computing time of all threads, which hardly depends on other processes. Peak memory is the increase
over the loaded model, its image and what the part is given: of the process, measured in one of its
own, on a CPU; of tensors on a GPU.
"""

from __future__ import annotations

import os

# Read when torch is loaded: threads that spin while they wait spoil the times of those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import Backbone, SwinTransformer
from kernel_benchmark.command import (
    check_config_names,
    check_counts,
    check_device,
    check_writable,
    chosen_threads,
)
from kernel_benchmark.memory import in_own_process, peak_memory
from kernel_benchmark.report import describe_machine, save_json
from kernel_benchmark.timing import SHORTEST_TURN_SECONDS, Timing, clock_for, interleave
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from efficient_detr.engine.building import build_model
from efficient_detr.engine.checks import check_arguments, check_parts, load_config
from efficient_detr.engine.commands import report_user_error
from efficient_detr.errors import UserError
from efficient_detr.modeling.backbones.dat import DAT
from efficient_detr.modeling.backbones.deformable_attention import (
    DeformableMapAttention,
)

CONFIGS = Path(__file__).parents[1] / "configs" / "backbones"
DEFAULT_CONFIGS = [
    str(CONFIGS / f"{name}.py") for name in ("dat_tiny", "dat_plus_plus_tiny", "swin_tiny")
]
PARTS = ("stem", "stage 0", "stage 1", "stage 2", "stage 3", "whole")
IN_CHUNKS, AT_ONCE = "in chunks", "at once"

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Row:
    """One part of one backbone.

    Attributes:
        size: (height, width) of the image.
        backbone: name of the config.
        chunks: "in chunks" or "at once" where it makes a difference, else "".
        part: one of `PARTS`.
        milliseconds: computing time of all threads on a CPU, time on the device on a GPU.
        wall_milliseconds: of the fastest turn.
        spread: (median - minimum) / minimum of the turns.
        peak_bytes: increase of memory; None if unknown.
    """

    size: Size
    backbone: str
    chunks: str
    part: str
    milliseconds: float
    wall_milliseconds: float
    spread: float
    peak_bytes: int | None


# Parts of a backbone -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Calls of modules, one after the other, as the backbone makes them.

    Attributes:
        calls: modules with their arguments.
        attentions: deformable attention in the backbone.
        max_logits: what these hold at once.
        training: whether gradients are part of the work.
    """

    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
    attentions: list[DeformableMapAttention]
    max_logits: int
    training: bool

    def __call__(self) -> None:
        """Do it."""
        for attention in self.attentions:
            attention.max_logits = self.max_logits
        with torch.set_grad_enabled(self.training):
            if not self.training:
                for module, args, kwargs in self.calls:
                    module(*args, **kwargs)
                return
            outputs = [module(*args, **kwargs) for module, args, kwargs in self.calls]
            total = torch.stack([tensor.float().sum() for tensor in _tensors(outputs)]).sum()
            torch.autograd.grad(total, self._leaves(), allow_unused=True)

    def _leaves(self) -> list[Tensor]:
        """Parameters and inputs."""
        parameters = chain.from_iterable(module.parameters() for module, _, _ in self.calls)
        tensors = chain.from_iterable(_tensors((args, kwargs)) for _, args, kwargs in self.calls)
        return list(
            {id(one): one for one in chain(parameters, tensors) if one.requires_grad}.values()
        )


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def find_backbone(model: nn.Module, config_file: str) -> Backbone:
    """The DAT or Swin in a model."""
    for module in model.modules():
        if isinstance(module, (DAT, SwinTransformer)):
            return module
    raise UserError(
        f"{config_file} has no DAT and no Swin Transformer: choose from configs/backbones."
    )


def modules_of(backbone: Any) -> dict[str, list[nn.Module]]:
    """For each part but the whole, the modules that are called one after the other."""
    stages = list(backbone.stages if isinstance(backbone, DAT) else backbone.layers)
    if isinstance(backbone, DAT):
        reductions = [[stage.merging, stage.projection] for stage in stages]
    else:
        reductions = [[backbone.patch_embed]] + [[stage.downsample] for stage in stages[:-1]]
    parts: dict[str, list[nn.Module]] = {"stem": reductions[0]}
    for index, stage in enumerate(stages):
        parts[f"stage {index}"] = [*(reductions[index] if index else []), *stage.blocks]
    return parts


def record_parts(
    backbone: Backbone, images: Tensor, max_logits: int, training: bool
) -> dict[str, Work]:
    """The work of each part, with the inputs that it gets in a call of the whole backbone."""
    parts = modules_of(backbone)
    given: dict[nn.Module, tuple[Any, Any]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[module] = torch.utils._pytree.tree_map_only(Tensor, as_leaf, (args, kwargs))

    def as_leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    handles = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for module in chain.from_iterable(parts.values())
    ]
    try:
        # With gradients in training, because masks and images want none there.
        with torch.set_grad_enabled(training):
            backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    options: dict[str, Any] = dict(
        attentions=attentions_of(backbone), max_logits=max_logits, training=training
    )
    found = {
        part: Work(calls=[(module, *given[module]) for module in modules], **options)
        for part, modules in parts.items()
    }
    return {**found, "whole": Work(calls=[(backbone, (images,), {})], **options)}


def attentions_of(backbone: nn.Module) -> list[DeformableMapAttention]:
    """All deformable attention of a backbone."""
    return [one for one in backbone.modules() if isinstance(one, DeformableMapAttention)]


@torch.no_grad()
def most_logits(backbone: nn.Module, images: Tensor) -> int:
    """Logits of the largest deformable attention, 0 without any."""
    counts = [0]

    def count(attention: Any, args: tuple[Tensor]) -> None:
        features = args[0]
        keys = attention.keys(features, attention.query(features)).features.shape[1]
        counts.append(attention.num_heads * features[..., 0].numel() * keys)

    handles = [one.register_forward_pre_hook(count) for one in attentions_of(backbone)]
    backbone(images)
    for handle in handles:
        handle.remove()
    return max(counts)


# Measuring ---------------------------------------------------------------------------------------


def build(config_file: str, training: bool, device: torch.device) -> Backbone:
    """The backbone of a config."""
    config = load_config(config_file, [])
    check_parts(config, ["model"])
    check_arguments(config)
    torch.manual_seed(0)
    return find_backbone(build_model(config), config_file).to(device).train(training)


def draw_image(size: Size, device: torch.device) -> Tensor:
    """(1, 3, H, W) of normalised values."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, *size, generator=generator).to(device)


def benchmark(arguments: argparse.Namespace) -> list[Row]:
    """Measure every backbone at every size; returns a row for each part."""
    check(arguments)
    device = torch.device(arguments.device)
    backbones = {
        Path(file).stem: build(file, arguments.training, device) for file in arguments.config_file
    }
    budgets = {name: budget_of(backbone, arguments) for name, backbone in backbones.items()}
    files = {Path(file).stem: file for file in arguments.config_file}
    rows: list[Row] = []
    with chosen_threads(arguments.threads):
        for size in arguments.sizes:
            works = prepare(backbones, budgets, draw_image(size, device), arguments)
            timings = time_all(works, device, arguments)
            for (name, chunks), parts in tqdm(works.items(), unit="backbone", disable=None):
                peaks = measure_memory(files[name], size, chunks, parts, arguments)
                rows += [
                    make_row(size, name, chunks, part, timings[name, chunks, part], peaks[part])
                    for part in parts
                ]
            if arguments.json:  # after each size, so that an interruption costs little
                save(rows, arguments)
    return rows


def prepare(
    backbones: dict[str, Backbone],
    budgets: dict[str, int],
    images: Tensor,
    arguments: argparse.Namespace,
) -> dict[tuple[str, str], dict[str, Work]]:
    """The parts of each backbone, twice where chunks make a difference."""
    works = {}
    for name, backbone in backbones.items():
        budget = budgets[name]
        limits = {IN_CHUNKS: budget, AT_ONCE: sys.maxsize}
        if most_logits(backbone, images) <= budget:
            limits = {"": budget}
        for chunks, limit in limits.items():
            works[name, chunks] = record_parts(backbone, images, limit, arguments.training)
    return works


def budget_of(backbone: nn.Module, arguments: argparse.Namespace) -> int:
    """How many logits deformable attention may hold at once."""
    limits = [one.max_logits for one in attentions_of(backbone)]
    return arguments.max_logits or min(limits, default=sys.maxsize)


def time_all(
    works: dict[tuple[str, str], dict[str, Work]], device: torch.device, arguments: Any
) -> dict[tuple[str, str, str], Timing]:
    """Times by backbone, chunks and part."""
    calls = {
        "\n".join((*key, part)): work
        for key, parts in works.items()
        for part, work in parts.items()
    }
    progress = tqdm(total=arguments.rounds, unit="round", disable=None)
    with progress:
        timings = interleave(
            calls,
            clock_for(device),
            arguments.rounds,
            turn_seconds=0.001 if arguments.rounds == 1 else SHORTEST_TURN_SECONDS,
            on_round=progress.update,
        )
    return {_key(name): timing for name, timing in timings.items()}


def _key(name: str) -> tuple[str, str, str]:
    backbone, chunks, part = name.split("\n")
    return backbone, chunks, part


def make_row(
    size: Size, name: str, chunks: str, part: str, timing: Timing, peak: int | None
) -> Row:
    """A row of the result."""
    return Row(
        size=size,
        backbone=name,
        chunks=chunks,
        part=part,
        milliseconds=1000 * (timing.cpu_seconds or timing.seconds),
        wall_milliseconds=1000 * timing.seconds,
        spread=timing.spread,
        peak_bytes=peak,
    )


def measure_memory(
    config_file: str,
    size: Size,
    chunks: str,
    parts: dict[str, Work],
    arguments: argparse.Namespace,
) -> dict[str, int | None]:
    """Peak memory of the parts; on a CPU in a process of its own, which has freed nothing yet."""
    if arguments.device != "cpu":
        return {part: peak_memory(work, torch.device("cuda")) for part, work in parts.items()}
    command = ["--only-memory", "--config-file", config_file]
    command += ["--sizes", f"{size[0]}x{size[1]}"]
    command += ["--threads", str(torch.get_num_threads())]
    command += ["--training"] if arguments.training else []
    command += ["--max-logits", str(parts["whole"].max_logits)]
    what = f"{Path(config_file).stem} at {size[0]}x{size[1]}"
    found: dict[str, int | None] = in_own_process(__file__, command, what)
    return found


def memory_of_parts(arguments: argparse.Namespace) -> dict[str, int | None]:
    """What the process that `measure_memory` starts does."""
    device = torch.device("cpu")
    torch.set_num_threads(arguments.threads)
    backbone = build(arguments.config_file[0], arguments.training, device)
    for one in attentions_of(backbone):
        one.max_logits = arguments.max_logits
    # Libraries that are loaded with the first call are no memory of the parts.
    record_parts(backbone, draw_image((64, 64), device), arguments.max_logits, True)["whole"]()
    images = draw_image(arguments.sizes[0], device)
    parts = record_parts(backbone, images, arguments.max_logits, arguments.training)
    return {part: peak_memory(work, device) for part, work in parts.items()}


# The command -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, or 2 after an error that the user can put right.
    """
    arguments = parse(argv)
    if arguments.only_memory:
        print(json.dumps(memory_of_parts(arguments)))
        return 0
    try:
        rows = benchmark(arguments)
    except UserError as error:
        return report_user_error(error)
    machine = describe_machine(torch.device(arguments.device))
    where = machine["cpu"] if arguments.device == "cpu" else machine["device"]
    threads = arguments.threads or machine["threads"]
    work = "forward and backward" if arguments.training else "forward"
    print(f"{work}, {where}, {threads} CPU threads, torch {machine['torch']}")
    style = "github" if arguments.markdown else "simple"
    print(f"\nMilliseconds\n\n{table(rows, 'milliseconds', style)}")
    print(f"\nPeak memory in MB\n\n{table(rows, 'peak_bytes', style)}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        nargs="+",
        default=DEFAULT_CONFIGS,
        metavar="FILE",
        help="models with a DAT or Swin (default: DAT-T, DAT++-T and Swin-T)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=image_size,
        default=[(224, 224), (800, 1280)],
        metavar="HEIGHTxWIDTH",
        help="default: 224x224 800x1280",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--training", action="store_true", help="with the backward pass")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns a contender")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as torch chooses")
    parser.add_argument("--max-logits", type=int, metavar="N", help="default: that of the module")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--markdown", action="store_true", help="print tables for documents")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def image_size(text: str) -> Size:
    """(height, width) from HEIGHTxWIDTH."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None or min(int(found[1]), int(found[2])) < 32:
        raise argparse.ArgumentTypeError(f"{text}: give HEIGHTxWIDTH, at least 32 pixels each.")
    return int(found[1]), int(found[2])


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is measured."""
    check_device(arguments.device)
    check_counts(arguments, ("rounds", "threads", "max_logits"))
    check_config_names(arguments.config_file)
    if arguments.json is not None:
        check_writable(arguments.json, "--json")


def save(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Write the numbers measured so far."""
    found = {
        "machine": describe_machine(torch.device(arguments.device)),
        "training": arguments.training,
        "rounds": arguments.rounds,
        "rows": [asdict(row) for row in rows],
    }
    save_json(found, arguments.json)


def table(rows: Sequence[Row], name: str, style: str) -> str:
    """One number of the rows: a line for each backbone and a column for each part."""
    lines: dict[tuple[Size, str, str], dict[str, str]] = {}
    for row in rows:
        value = getattr(row, name)
        if name == "peak_bytes":
            shown = "-" if value is None else f"{value / 1e6:.0f}"
        else:
            shown = f"{value:.1f}" if value < 100 else f"{value:.0f}"
        lines.setdefault((row.size, row.backbone, row.chunks), {})[row.part] = shown
    cells = [
        [f"{height}x{width}", backbone, chunks, *(line[part] for part in PARTS)]
        for ((height, width), backbone, chunks), line in lines.items()
    ]
    headers = ["image", "backbone", "deformable attention", *PARTS]
    return tabulate(
        cells,
        headers,
        tablefmt=style,
        disable_numparse=True,
        colalign=["left"] * 3 + ["right"] * len(PARTS),
    )


if __name__ == "__main__":
    sys.exit(main())
