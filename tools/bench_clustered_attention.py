#!/usr/bin/env python
"""Time clustered against dense attention, to find out where clustering pays on this machine.

    python tools/bench_clustered_attention.py --json output/clustered_attention.json
    python tools/bench_clustered_attention.py --tokens 1050 --rounds 16 --training

Both sides are the project's own attention between the projections: for clustered attention that is
hashing, grouping, averaging, attention of the prototypes and handing back. Queries are copies of as
many different ones as there shall be clusters. A number in the table is the time of dense attention
divided by that of clustered attention: above 1, clustering pays. One thread; computing time on a
CPU, which hardly depends on other processes, and the fastest of several turns.

The defaults of `min_tokens` and `max_cluster_ratio` come from this table; see docs/act.md.
"""

from __future__ import annotations

import os

# Read when torch is loaded: threads that spin while they wait spoil the times of those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_benchmark.timing import clock_for, interleave
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from efficient_detr.engine.commands import report_user_error
from efficient_detr.errors import UserError
from efficient_detr.files import replaced_file
from efficient_detr.modeling.attention.clustered import (
    ClusteredAttention,
    exact_attention,
)
from efficient_detr.modeling.attention.token_clustering import TokenClustering, hashed_queries

HEADS, HEAD_CHANNELS = 8, 32


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
    print(table(rows, arguments.ratios))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[500, 850, 1050, 2100, 4200], metavar="N"
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=float,
        default=[0.05, 0.1, 0.25, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0],
        metavar="C/N",
        help="clusters per token",
    )
    parser.add_argument("--rounds", type=int, default=32, metavar="L", help="rounds of hashing")
    parser.add_argument("--training", action="store_true", help="time the backward pass as well")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="turns a contender")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser.parse_args(argv)


def benchmark(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every number of tokens at every ratio; returns a row for each number of tokens."""
    check(arguments)
    device = torch.device(arguments.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for tokens in tqdm(arguments.tokens, unit="size", disable=None):
            rows.append(measure(tokens, arguments, device))
            if arguments.json:  # after each size, so that an interruption costs little
                save(rows, arguments)
    finally:
        torch.set_num_threads(threads)
    return rows


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is measured."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use, and there is none here.")
    if not all(0 < ratio <= 1 for ratio in arguments.ratios):
        raise UserError(f"--ratios must lie in (0, 1], but are {arguments.ratios}.")
    if min(*arguments.tokens, arguments.rounds, arguments.turns, 1) < 1:
        raise UserError("--tokens, --rounds and --turns must be at least 1.")
    if arguments.json:
        try:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{arguments.json} cannot be written: {error.strerror}.") from error


def measure(tokens: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of dense attention and of clustered attention at each ratio, for N tokens."""
    attention = build(arguments.rounds).to(device)
    calls: dict[str, Callable[[], object]] = {}
    clusters = {}
    run = attend_and_learn if arguments.training else attend
    for ratio in arguments.ratios:
        heads = draw_heads(tokens, max(1, round(ratio * tokens)), device)
        clusters[ratio] = count_clusters(attention, heads[0])
        calls[str(ratio)] = partial(run, attention, heads)
    calls["dense"] = partial(run_dense, run, attention, heads)
    for call in calls.values():  # warm up
        call()
    timings = interleave(calls, clock_for(device), arguments.turns)
    seconds = {name: timing.cpu_seconds or timing.seconds for name, timing in timings.items()}
    return {
        "tokens": tokens,
        "dense_seconds": seconds["dense"],
        "clustered": [
            {
                "ratio": ratio,
                "clusters": clusters[ratio],
                "seconds": seconds[str(ratio)],
                "speedup": seconds["dense"] / seconds[str(ratio)],
            }
            for ratio in arguments.ratios
        ],
    }


def build(rounds: int) -> ClusteredAttention:
    """Attention as in DETR, that always clusters."""
    clustering = TokenClustering(head_channels=HEAD_CHANNELS, rounds=rounds)
    return ClusteredAttention(
        channels=HEADS * HEAD_CHANNELS,
        num_heads=HEADS,
        query_clustering=clustering,
        min_tokens=0,
        max_cluster_ratio=1.0,
    )


def draw_heads(tokens: int, centres: int, device: torch.device) -> list[Tensor]:
    """Queries (1, H, N, D), copies of some centres, and keys and values of the same shape.

    Centres are so long that each has cells of its own; heads are slices of the channels of a
    token, as the projections leave them.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, HEADS, HEAD_CHANNELS)
    different = 100 * torch.randn(1, centres, HEADS, HEAD_CHANNELS, generator=generator)
    others = torch.randint(centres, (tokens - centres,), generator=generator)
    chosen = torch.cat([torch.arange(centres), others])
    query = different[:, chosen[torch.randperm(tokens, generator=generator)]]
    keys = (torch.randn(shape, generator=generator) for _ in range(2))
    return [heads.to(device).transpose(1, 2).requires_grad_() for heads in (query, *keys)]


def count_clusters(attention: ClusteredAttention, query: Tensor) -> float:
    """Mean number of clusters of a head."""
    clustering = attention.query_clustering
    assert clustering is not None
    assigned = clustering(hashed_queries(query))
    return float(assigned.num_clusters.double().mean())


@torch.no_grad()
def attend(attention: ClusteredAttention, heads: Sequence[Tensor]) -> Tensor:
    """The forward pass, with masks as an encoder layer gives them."""
    return forward(attention, heads)


def attend_and_learn(attention: ClusteredAttention, heads: Sequence[Tensor]) -> object:
    """The forward and the backward pass."""
    return torch.autograd.grad(forward(attention, heads).sum(), list(heads))


def forward(attention: ClusteredAttention, heads: Sequence[Tensor]) -> Tensor:
    """Attention of heads without padding."""
    query, key, value = heads
    padding = torch.zeros(1, query.shape[2], dtype=torch.bool, device=query.device)
    return attention.attend_heads_in_clusters(query, key, value, padding, padding)


def run_dense(
    run: Callable[[ClusteredAttention, Sequence[Tensor]], object],
    attention: ClusteredAttention,
    heads: Sequence[Tensor],
) -> object:
    """The same pass with dense attention."""
    with exact_attention(attention):
        return run(attention, heads)


def save(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write the numbers measured so far."""
    found = {
        "device": arguments.device,
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "training": arguments.training,
        "rows": rows,
    }
    with replaced_file(arguments.json) as path:
        path.write_text(json.dumps(found, indent=1) + "\n")


def table(rows: list[dict[str, Any]], ratios: Sequence[float]) -> str:
    """A Markdown table: a line for each number of tokens."""
    lines = [
        [row["tokens"], f"{1000 * row['dense_seconds']:.1f}"]
        + [f"{entry['speedup']:.2f}" for entry in row["clustered"]]
        for row in rows
    ]
    headers = ["tokens", "dense, ms", *(f"C/N {ratio:g}" for ratio in ratios)]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
