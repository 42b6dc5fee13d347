"""Running a model over a dataset and handing its outputs to evaluators."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from detectron2.utils.comm import get_world_size, is_main_process
from detectron2.utils.logger import log_every_n_seconds

logger = logging.getLogger(__name__)


class DatasetEvaluator:
    """Collects outputs batch by batch and sums them up at the end."""

    def reset(self) -> None:
        """Prepare for a new round."""

    def process(self, inputs: Any, outputs: Any) -> None:
        """Take the inputs and outputs of one batch."""

    def evaluate(self) -> Any:
        """Results, e.g. {task: {metric: value}}; called after all batches, in all processes."""


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one; their results are joined."""

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        self._evaluators = evaluators

    def reset(self) -> None:
        """Reset all."""
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: Any, outputs: Any) -> None:
        """Hand a batch to all."""
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict[str, Any]:
        """Results of all (in the main process); AssertionError if two have the same key."""
        joined: dict[str, Any] = {}
        for evaluator in self._evaluators:
            results = evaluator.evaluate()
            if is_main_process() and results is not None:
                repeated = joined.keys() & results.keys()
                assert not repeated, f"several evaluators return results for {sorted(repeated)}"
                joined.update(results)
        return joined


class _Clock:
    """Seconds spent in each part of an iteration, since the end of the warm-up."""

    def __init__(self, total: int) -> None:
        self.total, self.warmup = total, min(5, total - 1)
        self.restart(0)

    def restart(self, iteration: int) -> None:
        self.first = iteration
        self.start = self.last = time.perf_counter()
        self.spent = {"data": 0.0, "inference": 0.0, "evaluation": 0.0}

    def stop(self, part: str) -> None:
        now = time.perf_counter()
        self.spent[part] += now - self.last
        self.last = now

    def report(self, iteration: int) -> None:
        done = iteration + 1 - self.first
        per_iteration = {part: seconds / done for part, seconds in self.spent.items()}
        if iteration >= 2 * self.warmup or per_iteration["inference"] > 5:
            left = (time.perf_counter() - self.start) / done * (self.total - iteration - 1)
            parts = ", ".join(f"{part} {seconds:.4f}" for part, seconds in per_iteration.items())
            eta = timedelta(seconds=int(left))
            text = f"Inference done {iteration + 1}/{self.total}. s/iter: {parts}. ETA={eta}"
            log_every_n_seconds(logging.INFO, text, n=5)


def inference_on_dataset(
    model: Callable[[Any], Any],
    data_loader: Any,
    evaluator: DatasetEvaluator | MutableSequence[DatasetEvaluator] | None,
    callbacks: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Any]:
    """Run ``model`` over all batches without gradients, and evaluate its outputs.

    Args:
        model: a function of a batch. A module runs in evaluation mode and returns to its mode.
        data_loader: batches; it has a length.
        evaluator: one, several, or None to run the model only.
        callbacks: functions to call: ``on_start``, ``before_inference``, ``after_inference``,
            ``on_end``.

    Returns:
        What the evaluator returns; an empty dictionary in place of None.
    """
    if evaluator is None or isinstance(evaluator, MutableSequence):
        evaluator = DatasetEvaluators(evaluator or [])
    hooks = {} if callbacks is None else callbacks
    logger.info("Start inference on %d batches", len(data_loader))
    evaluator.reset()
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        hooks.get("on_start", _nothing)()
        clock = _Clock(len(data_loader))
        for iteration, inputs in enumerate(data_loader):
            clock.stop("data")
            if iteration == clock.warmup:
                clock.restart(iteration)
            hooks.get("before_inference", _nothing)()
            outputs = model(inputs)
            hooks.get("after_inference", _nothing)()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.stop("inference")
            evaluator.process(inputs, outputs)
            clock.stop("evaluation")
            clock.report(iteration)
        hooks.get("on_end", _nothing)()
    seconds = (time.perf_counter() - clock.start) / max(1, clock.total - clock.first)
    logger.info("Inference took %.6f s / iter on each of %d devices", seconds, get_world_size())
    results = evaluator.evaluate()
    return {} if results is None else results


def _nothing() -> None:
    """Stands in for a callback that is not given."""


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the earlier mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
