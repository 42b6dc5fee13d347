"""Running a model over a dataset and handing its outputs to evaluators."""

import logging
import time
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
from detectron2.utils.comm import is_main_process
from torch import nn

logger = logging.getLogger(__name__)


class DatasetEvaluator:
    """Collects outputs batch by batch and sums them up at the end, in all processes."""

    def reset(self) -> None:
        pass

    def process(self, inputs: Any, outputs: Any) -> None:
        pass

    def evaluate(self) -> Any:
        """Results, e.g. {task: {metric: value}}."""


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one; their results are joined and must not have a key in common."""

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        self._evaluators = evaluators

    def reset(self) -> None:
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: Any, outputs: Any) -> None:
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict[str, Any]:
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
) -> dict[str, Any]:
    """Run ``model`` over all batches, a module in evaluation mode, and evaluate its outputs."""
    if evaluator is None or isinstance(evaluator, MutableSequence):
        evaluator = DatasetEvaluators(evaluator or [])
    evaluator.reset()
    total = len(data_loader)
    logger.info("Start inference on %d batches", total)
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        logged = start = time.perf_counter()
        for done, inputs in enumerate(data_loader, start=1):
            evaluator.process(inputs, model(inputs))
            now = time.perf_counter()
            if now - logged > 5 or done == total:
                logged, seconds = now, (now - start) / done
                eta = timedelta(seconds=int(seconds * (total - done)))
                logger.info("Inference %d/%d, %.4f s/batch, ETA %s", done, total, seconds, eta)
    return evaluator.evaluate() or {}


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the earlier mode after it."""
    training = model.training
    model.eval()
    yield
    model.train(training)
