"""Times of a model's stages during whole forward passes.

A stop watch runs through the pass. Hooks on the stages tell it which of them is running, and each
moment counts for exactly one: stages add up to the whole, and what runs in none is "other". A stage
that lives inside another (the prediction heads inside the decoder) takes its time away from it.
Modules of a stage that another one borrows count for the borrower, as multiply-adds do.

Hooks cost a few microseconds a pass. On a GPU they record events, and nobody waits for the device
before the pass is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from efficient_detr.evaluation.flops import OTHER_STAGE


@dataclass(frozen=True)
class Duration:
    """How long something took.

    Attributes:
        seconds: wall-clock time on a CPU, time on the device on a GPU.
        cpu_seconds: computing time of all threads of this process together; None on a GPU.
    """

    seconds: float
    cpu_seconds: float | None

    def __add__(self, other: Duration) -> Duration:
        """Both together."""
        if self.cpu_seconds is None or other.cpu_seconds is None:
            return Duration(self.seconds + other.seconds, None)
        return Duration(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


class StopWatch(Protocol):
    """Takes moments, which are its own business, and tells what lies between them."""

    def now(self) -> Any:
        """The present moment."""

    def wait(self) -> None:
        """Until all moments have come: a device may be behind."""

    def between(self, start: Any, end: Any) -> Duration:
        """From one moment to another; only after `wait`."""


class CPUStopWatch:
    """Wall-clock time and computing time."""

    def now(self) -> tuple[float, float]:
        """See `StopWatch`."""
        return time.perf_counter(), time.process_time()

    def wait(self) -> None:
        """A CPU is never behind."""

    def between(self, start: tuple[float, float], end: tuple[float, float]) -> Duration:
        """See `StopWatch`."""
        return Duration(end[0] - start[0], end[1] - start[1])


class CUDAStopWatch:
    """Events in the device's stream of work."""

    def now(self) -> Any:
        """See `StopWatch`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """See `StopWatch`."""
        torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> Duration:
        """See `StopWatch`."""
        return Duration(start.elapsed_time(end) / 1000, None)


def stop_watch_for(device: torch.device) -> StopWatch:
    """The stop watch of a device."""
    return CUDAStopWatch() if device.type == "cuda" else CPUStopWatch()


class StageTimer:
    """Tells how long each stage of a model runs during a piece of work.

    Args:
        stages: name -> module. One without a forward pass of its own (a list of modules) runs when
            one of its members does.
        watch: of the model's device.
    """

    def __init__(self, stages: Mapping[str, nn.Module], watch: StopWatch) -> None:
        self._watch = watch
        self._stages = list(stages)
        self._inside = {name: _stages_inside(module, stages) for name, module in stages.items()}
        self._running: list[str] = []  # stages from the outermost to the innermost
        self._marks: list[tuple[Any, str]] = []  # moments, and the stages that begin with them
        for name, module in stages.items():
            for member in _callable_modules(module):
                member.register_forward_pre_hook(self._on_entry(name))
                # Also after an exception, so that entries and exits stay paired.
                member.register_forward_hook(self._on_exit, always_call=True)

    def measure(self, work: Callable[[], object]) -> dict[str, Duration]:
        """Do something once.

        Args:
            work: runs the model, and may name phases with `begin_phase`.

        Returns:
            Stages, phases and "other", as far as they ran, in the order of their first start. They
            add up to the whole.
        """
        self._watch.wait()
        self._running, self._marks = [OTHER_STAGE], []
        try:
            self._mark()
            work()
            self._mark()
            self._watch.wait()
            return self._durations()
        finally:
            self._running, self._marks = [], []

    def begin_phase(self, name: str) -> None:
        """From now on, no stage runs but this phase, such as the backward pass."""
        if self._running:
            self._running = [name]
            self._mark()

    def in_order(self, found: Collection[str]) -> list[str]:
        """Names that `measure` has returned: as the model has its stages, then phases, the rest."""
        names = [name for name in found if name != OTHER_STAGE]
        order = [*self._stages, *names, OTHER_STAGE]
        return [name for name in dict.fromkeys(order) if name in found]

    def _durations(self) -> dict[str, Duration]:
        found: dict[str, Duration] = {}
        for (start, name), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            duration = self._watch.between(start, end)
            found[name] = found[name] + duration if name in found else duration
        return found

    def _on_entry(self, name: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            # Inside a compiled graph there is no moment to take: the time is the graph's.
            if torch.compiler.is_compiling() or not self._running:
                return
            running = self._running[-1]
            counts = running == OTHER_STAGE or name in self._inside.get(running, ())
            self._running.append(name if counts else running)
            self._mark_if_new(running)

        return enter

    def _on_exit(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # One entry is left when a phase has begun meanwhile.
        if torch.compiler.is_compiling() or len(self._running) < 2:
            return
        self._mark_if_new(self._running.pop())

    def _mark_if_new(self, before: str) -> None:
        if self._running[-1] != before:
            self._mark()

    def _mark(self) -> None:
        self._marks.append((self._watch.now(), self._running[-1]))


def outer_stages(stages: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The stages that live in no other."""
    inner = {name for module in stages.values() for name in _stages_inside(module, stages)}
    return {name: module for name, module in stages.items() if name not in inner}


def _stages_inside(module: nn.Module, stages: Mapping[str, nn.Module]) -> set[str]:
    parts = {id(part) for part in module.modules() if part is not module}
    return {name for name, stage in stages.items() if id(stage) in parts}


def _callable_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The module itself, or the outermost modules inside it that have a forward pass."""
    if type(module).forward is not nn.Module.forward:
        yield module
        return
    for child in module.children():
        yield from _callable_modules(child)
