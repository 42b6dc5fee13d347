"""Compare times on machines that others use as well.

Contenders take turns in one process, so that a busy minute hits all of them, and each is judged by
its fastest turn: another process can only make a turn slower, never faster, so the minimum is the
least disturbed number and a mean or median still contains part of the disturbance. How much there
was shows in the spread, the distance of the median from the minimum. On a CPU, the time that all
threads of this process spent computing is taken as well; it hardly depends on other processes.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]

FEWEST_ROUNDS = 3
LONGEST_CASE_SECONDS = 90.0
SHORTEST_TURN_SECONDS = 0.03
_MOST_REPETITIONS = 100


@dataclass(frozen=True)
class Timing:
    """Times of one call.

    Attributes:
        seconds: of the fastest turn: wall-clock time on a CPU, time on the device on a GPU.
        cpu_seconds: least computing time of all threads together; None on a GPU.
        spread: (median - minimum) / minimum of the turns.
        rounds: number of turns.
    """

    seconds: float
    cpu_seconds: float | None
    spread: float
    rounds: int


class Clock(Protocol):
    """Times calls on one kind of device."""

    def turn(self, call: Call, repetitions: int) -> tuple[float, float | None]:
        """Returns the mean seconds of a call and, if known, its seconds of computing."""


class CPUClock:
    """Wall-clock time and computing time."""

    def turn(self, call: Call, repetitions: int) -> tuple[float, float | None]:
        """See `Clock`."""
        wall, computing = time.perf_counter(), time.process_time()
        for _ in range(repetitions):
            call()
        wall, computing = time.perf_counter() - wall, time.process_time() - computing
        return wall / repetitions, computing / repetitions


class CUDAClock:
    """Time between two events on the device, with cold caches before each call.

    In a model, other layers have pushed the inputs out of the cache; writing a buffer larger than
    the cache does so here. It also keeps the device busy while the host prepares the call.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(max(4 * cache, 1 << 26), dtype=torch.uint8, device=device)

    def turn(self, call: Call, repetitions: int) -> tuple[float, float | None]:
        """See `Clock`."""
        pairs = []
        for _ in range(repetitions):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flushed.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        milliseconds = sum(start.elapsed_time(end) for start, end in pairs)
        return milliseconds / 1000 / repetitions, None


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CUDAClock(device) if device.type == "cuda" else CPUClock()


def interleave(
    calls: Mapping[str, Call],
    clock: Clock,
    rounds: int,
    *,
    turn_seconds: float = SHORTEST_TURN_SECONDS,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Lets every contender have one turn a round, starting with another one each round.

    Args:
        calls: contenders by name, warmed up.
        clock: of their device.
        rounds: number of rounds; fewer, but at least three, are done if a case takes minutes.
        turn_seconds: how long a turn should be at least; fast calls are repeated within it.
        on_round: called after each round.

    Returns:
        The times by contender.
    """
    gc.collect()
    repetitions = {name: _repetitions(call, clock, turn_seconds) for name, call in calls.items()}
    turns: dict[str, list[tuple[float, float | None]]] = {name: [] for name in calls}
    start = time.perf_counter()
    for index, order in enumerate(round_robin(list(calls), rounds)):
        for name in order:
            turns[name].append(clock.turn(calls[name], repetitions[name]))
        on_round()
        too_long = time.perf_counter() - start > LONGEST_CASE_SECONDS
        if too_long and index + 1 >= FEWEST_ROUNDS:
            break
    return {name: _summarize(taken) for name, taken in turns.items()}


def round_robin(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: everyone in turn, starting with another one each round."""
    for index in range(rounds):
        first = index % len(names)
        yield [*names[first:], *names[:first]]


def _repetitions(call: Call, clock: Clock, turn_seconds: float) -> int:
    """How many calls make a turn long enough."""
    seconds, _ = clock.turn(call, 1)
    return min(max(math.ceil(turn_seconds / max(seconds, 1e-9)), 1), _MOST_REPETITIONS)


def _summarize(turns: list[tuple[float, float | None]]) -> Timing:
    walls = [wall for wall, _ in turns]
    computing = [cpu for _, cpu in turns if cpu is not None]
    return Timing(min(walls), min(computing) if computing else None, spread_of(walls), len(turns))


def spread_of(seconds: Sequence[float]) -> float:
    """(median - minimum) / minimum; 0 if nothing took any time."""
    least = min(seconds)
    return statistics.median(seconds) / least - 1 if least else 0.0


def copy_bandwidth(device: torch.device, clock: Clock, rounds: int, megabytes: int) -> float:
    """Bytes a second, read and written together, of torch's copy of a large tensor."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, clock, max(rounds, 5))["copy"]
    return 2 * source.numel() * source.element_size() / timing.seconds
