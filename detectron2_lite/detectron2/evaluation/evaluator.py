"""Running a model over a dataset and handing its outputs to evaluators."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
from detectron2.utils.comm import is_main_process
from detectron2.utils.logger import log_every_n_seconds
from torch import nn

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
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: Any, outputs: Any) -> None:
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
    calls = {} if callbacks is None else callbacks
    total = len(data_loader)
    warmup = min(5, total - 1)
    logger.info("Start inference on %d batches", total)
    evaluator.reset()
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        calls.get("on_start", _nothing)()
        start, computing = time.perf_counter(), 0.0
        for iteration, inputs in enumerate(data_loader):
            if iteration == warmup:
                start, computing = time.perf_counter(), 0.0
            before = time.perf_counter()
            calls.get("before_inference", _nothing)()
            outputs = model(inputs)
            calls.get("after_inference", _nothing)()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            computing += time.perf_counter() - before
            evaluator.process(inputs, outputs)
            if iteration >= 2 * warmup or time.perf_counter() - before > 5:
                done = iteration + 1 - (warmup if iteration >= warmup else 0)
                _log_progress(iteration, total, computing / done, start, done)
        calls.get("on_end", _nothing)()
    each, batches = time.perf_counter() - start, max(1, total - warmup)
    logger.info(
        "Inference took %.4f s / batch, the model alone %.4f", each / batches, computing / batches
    )
    results = evaluator.evaluate()
    return {} if results is None else results


def _log_progress(iteration: int, total: int, computing: float, start: float, done: int) -> None:
    seconds = (time.perf_counter() - start) / done
    eta = timedelta(seconds=int(seconds * (total - iteration - 1)))
    speed = f"{seconds:.4f} s / batch, the model alone {computing:.4f}"
    message = f"Inference done {iteration + 1}/{total}. {speed}. ETA={eta}"
    log_every_n_seconds(logging.INFO, message, n=5)


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
