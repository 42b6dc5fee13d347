#!/usr/bin/env python
"""Time formulations of SMCA's modulated attention against each other, in one run.

    python tools/bench_modulation.py --threads 1
    python tools/bench_modulation.py --device cuda --rounds 15

The work is one attention of 300 queries with 8 heads of 32 channels to one level of an image of
800x1333, between the projections: from centres and scales to the attended values. In training there
is dropout of 0.1 and the gradients are part of the work.

    published form    a tensor (Q, H_l W_l, B H, 2) of squared distances, then logits, their sum and
                      the softmax one after the other
    separable bias    parts for columns and rows, padding merged into them, one addition, and
                      PyTorch's scaled dot-product attention; what the project does
    folded features   four further channels of queries and keys whose product is the Gaussian, with
                      coordinates from the middle of the map

Contenders take turns, and each counts with its fastest turn; on a CPU that is computing time of all
threads, which hardly depends on other processes. "Times" is the time of the published form divided
by that of the row, "memory" the most that its tensors take at a time, and "error" the largest
difference from float64, relative to the largest number of a tensor; gradients count too. "In
bfloat16" is the error of the output with queries, keys and values of that type, while centres and
scales are given in float32.
"""

from __future__ import annotations

import os

# Read when torch is loaded: threads that spin while they wait spoil the times of those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_benchmark.case import relative_error
from kernel_benchmark.report import describe_machine
from kernel_benchmark.timing import SHORTEST_TURN_SECONDS, clock_for, interleave
from tabulate import tabulate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from efficient_detr.engine.commands import report_user_error
from efficient_detr.errors import UserError
from efficient_detr.modeling.attention.gaussian_scale import AxisScale
from efficient_detr.modeling.attention.spatially_modulated import modulation_bias

HEADS, HEAD_CHANNELS, QUERIES, BETA, DROPOUT = 8, 32, 300, 8.0, 0.1


@dataclass(frozen=True)
class Level:
    """A level of a memory.

    Attributes:
        name: for the table.
        shape: (H_l, W_l).
        factor: on squared distances.
    """

    name: str
    shape: tuple[int, int]
    factor: float


# Stride 32 is the same in the models with several levels.
LEVELS = (
    Level("one level: stride 32", (25, 42), 1.0),
    Level("several: stride 16", (50, 84), 0.5),
    Level("several: stride 64", (13, 21), 2.0),
)
SMALL_LEVELS = (Level("small", (5, 7), 1.0),)


@dataclass(frozen=True)
class Inputs:
    """What a formulation computes with.

    Attributes:
        query: (B, H, Q, D), unscaled.
        key: (B, H, S, D).
        value: (B, H, S, D).
        centers: (B, H, Q, 2) centres (x, y), in cells.
        weights: (B, H, Q, 2) squared scales times -f / beta.
        padding: (B, H_l, W_l) bool, True on padding.
        dropout: probability on the attention weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    centers: Tensor
    weights: Tensor
    padding: Tensor
    dropout: float = 0.0

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that get gradients in training."""
        return [self.query, self.key, self.value, self.centers, self.weights]

    def converted(
        self, dtype: torch.dtype, *, gradients: bool = False, dropout: float = 0.0
    ) -> Inputs:
        """The same numbers in another dtype; centres and scales are kept in float32 or better."""
        at_least = torch.promote_types(dtype, torch.float32)
        leaves = [
            leaf.detach().to(dtype if index < 3 else at_least).requires_grad_(gradients)
            for index, leaf in enumerate(self.leaves)
        ]
        return make_inputs(leaves, self.padding, dropout)


def make_inputs(leaves: Sequence[Tensor], padding: Tensor, dropout: float = 0.0) -> Inputs:
    """Inputs with the given `Inputs.leaves`."""
    query, key, value, centers, weights = leaves
    return Inputs(query, key, value, centers, weights, padding, dropout)


Formulation = Callable[[Inputs], Tensor]


def draw_inputs(level: Level, device: torch.device, queries: int) -> Inputs:
    """Inputs as early in training: scales around 1, centres anywhere; two columns are padding."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    height, width = level.shape
    tokens = height * width
    sides = torch.tensor([width - 2.0, float(height)])
    centers = torch.rand(1, HEADS, queries, 2, generator=generator) * sides
    scales = (1 + 0.3 * normal(1, HEADS, queries, 2)).square()
    padding = torch.zeros(1, height, width, dtype=torch.bool)
    padding[..., -2:] = True
    leaves = (
        normal(1, HEADS, queries, HEAD_CHANNELS),
        normal(1, HEADS, tokens, HEAD_CHANNELS),
        normal(1, HEADS, tokens, HEAD_CHANNELS),
        centers,
        scales * (-level.factor / BETA),
    )
    return make_inputs([leaf.to(device) for leaf in leaves], padding.to(device))


# Formulations ------------------------------------------------------------------------------------


def published_form(inputs: Inputs) -> Tensor:
    """As in the authors' code: every pair of a query and a cell has its two squared distances."""
    (batch, heads, queries, channels), key = inputs.query.shape, inputs.key.flatten(0, 1)
    cells = _cells(inputs, 0.0, 0.0)
    centers, weights = (
        tensor.permute(2, 0, 1, 3).flatten(1, 2) for tensor in (inputs.centers, inputs.weights)
    )  # (Q, B H, 2)
    squares = (centers[:, None] - cells[None, :, None]).square() * weights[:, None]
    gaussian = squares.sum(-1).permute(2, 0, 1)  # (B H, Q, S)
    logits = (inputs.query * channels**-0.5).flatten(0, 1) @ key.transpose(1, 2)
    logits = logits.view(batch, heads, queries, -1)
    logits = logits.masked_fill(inputs.padding.flatten(1)[:, None, None], -torch.inf).flatten(0, 1)
    attention = F.dropout((logits + gaussian).softmax(-1), inputs.dropout)
    attention = attention.to(inputs.value.dtype)
    return (attention @ inputs.value.flatten(0, 1)).view(batch, heads, queries, channels)


def separable_bias(inputs: Inputs) -> Tensor:
    """The project's: one bias from a part for each column and a part for each row."""
    scale = AxisScale(channels=1, num_heads=HEADS)
    bias = modulation_bias(scale, inputs.weights, inputs.centers, inputs.padding).flatten(-2)
    return F.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, bias.to(inputs.query.dtype), inputs.dropout
    )


def folded_features(inputs: Inputs) -> Tensor:
    """The Gaussian as a product of four further channels, without what depends on queries only."""
    height, width = inputs.padding.shape[1:]
    middle = ((width - 1) / 2, (height - 1) / 2)
    cells = _cells(inputs, *middle)
    centers = inputs.centers - inputs.centers.new_tensor(middle)
    query = inputs.query * inputs.query.shape[-1] ** -0.5
    of_query = torch.cat([inputs.weights, -2 * inputs.weights * centers], dim=-1)
    query = torch.cat([query, of_query.to(query.dtype)], dim=-1)
    further = torch.cat([cells.square(), cells], dim=-1).to(query.dtype)  # (S, 4)
    key = torch.cat([inputs.key, further.expand(*inputs.key.shape[:2], -1, -1)], dim=-1)
    # Fused kernels want values as wide as keys.
    value = F.pad(inputs.value, (0, further.shape[-1]))
    visible = ~inputs.padding.flatten(1)[:, None, None]
    attended = F.scaled_dot_product_attention(query, key, value, visible, inputs.dropout, scale=1.0)
    return attended[..., : inputs.value.shape[-1]]


def _cells(inputs: Inputs, x: float, y: float) -> Tensor:
    """(S, 2) cells (x, y), counted from a point."""
    height, width = inputs.padding.shape[1:]
    options: dict[str, Any] = dict(dtype=inputs.centers.dtype, device=inputs.centers.device)
    rows, columns = torch.arange(height, **options) - y, torch.arange(width, **options) - x
    return torch.cartesian_prod(rows, columns).flip(1)


FORMULATIONS: dict[str, Formulation] = {
    "published form": published_form,
    "separable bias": separable_bias,
    "folded features": folded_features,
}


# Measuring ---------------------------------------------------------------------------------------


def run_once(formulation: Formulation, inputs: Inputs) -> list[Tensor]:
    """The output and, if the inputs want them, the gradients of its sum of squares."""
    training = inputs.query.requires_grad
    with torch.set_grad_enabled(training):
        output = formulation(inputs)
        if not training:
            return [output]
        gradients = torch.autograd.grad(output.square().sum(), inputs.leaves)
    return [output.detach(), *gradients]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at a time, among those made inside it.

    What operators use inside themselves is not seen.

    Attributes:
        peak: the most so far, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and note the storages of its results."""
        before = {_storage_of(t)._cdata for t in _tensors((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for tensor in _tensors(results):
            storage = _storage_of(tensor)
            if storage._cdata not in before and storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return results


def _storage_of(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def peak_bytes(formulation: Formulation, inputs: Inputs) -> int:
    """Most memory that a formulation takes at a time beyond its inputs."""
    if inputs.query.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(formulation, inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        run_once(formulation, inputs)
    return memory.peak


def find_errors(inputs: Inputs) -> dict[str, float]:
    """The error of each formulation."""
    training = inputs.query.requires_grad
    exact = run_once(published_form, inputs.converted(torch.float64, gradients=training))
    return {
        name: relative_error(run_once(formulation, inputs), exact)
        for name, formulation in FORMULATIONS.items()
    }


def measure(
    level: Level, training: bool, arguments: argparse.Namespace, device: torch.device
) -> list[list[object]]:
    """A row of the table for each formulation of one case."""
    drawn = draw_inputs(level, device, 10 if arguments.small else QUERIES)
    # Errors without dropout: the formulations would draw different numbers.
    errors = find_errors(drawn.converted(torch.float32, gradients=training))
    half_errors = find_errors(drawn.converted(torch.bfloat16))
    inputs = drawn.converted(
        torch.float32, gradients=training, dropout=DROPOUT if training else 0.0
    )
    memory = {name: peak_bytes(form, inputs) for name, form in FORMULATIONS.items()}
    calls = {name: partial(run_once, form, inputs) for name, form in FORMULATIONS.items()}
    timings = interleave(
        calls,
        clock_for(device),
        arguments.rounds,
        turn_seconds=0.001 if arguments.small else SHORTEST_TURN_SECONDS,
    )
    seconds = {name: timing.cpu_seconds or timing.seconds for name, timing in timings.items()}
    return [
        [
            level.name,
            "training" if training else "inference",
            name,
            f"{1000 * seconds[name]:.2f}",
            f"{seconds['published form'] / seconds[name]:.1f}",
            f"{memory[name] / 1e6:.1f}",
            f"{errors[name]:.1e}",
            "" if training else f"{half_errors[name]:.1e}",
        ]
        for name in FORMULATIONS
    ]


# The command -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, or 2 after an error that the user can put right.
    """
    arguments = parse(argv)
    try:
        rows = benchmark(arguments)
    except UserError as error:
        return report_user_error(error)
    machine = describe_machine(torch.device(arguments.device))
    where = machine["cpu"] if arguments.device == "cpu" else machine["device"]
    print(f"{where}, {machine['threads']} CPU threads, torch {machine['torch']}\n")
    headers = ["level", "work", "formulation", "ms", "times", "memory (MB)"]
    headers += ["error", "in bfloat16"]
    style = "github" if arguments.markdown else "simple"
    print(tabulate(rows, headers, tablefmt=style, disable_numparse=True))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns a contender")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as torch chooses")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the command out")
    parser.add_argument("--markdown", action="store_true", help="print a table for documents")
    return parser.parse_args(argv)


def benchmark(arguments: argparse.Namespace) -> list[list[object]]:
    """Measure every level in inference and in training; returns the rows of the table."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use, and there is none here.")
    for name in ("rounds", "threads"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise UserError(f"--{name} must be at least 1, not {number}.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cases = [
        (level, training)
        for level in (SMALL_LEVELS if arguments.small else LEVELS)
        for training in (False, True)
    ]
    rows = []
    for level, training in tqdm(cases, unit="case", disable=None):
        rows += measure(level, training, arguments, torch.device(arguments.device))
    return rows


if __name__ == "__main__":
    sys.exit(main())
