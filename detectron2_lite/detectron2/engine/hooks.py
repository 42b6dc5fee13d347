"""The hooks of most trainings."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from fvcore.common.param_scheduler import ParamScheduler

from .train_loop import HookBase

_Callback = Callable[[Any], Any] | None


class CallbackHook(HookBase):
    """Calls, at each moment for which one is given, a function of the trainer."""

    def __init__(
        self,
        *,
        before_train: _Callback = None,
        after_train: _Callback = None,
        before_step: _Callback = None,
        after_step: _Callback = None,
    ) -> None:
        given = {"before_train": before_train, "after_train": after_train}
        given.update(before_step=before_step, after_step=after_step)
        for moment, function in given.items():
            if function is not None:
                setattr(self, moment, partial(self._call, function))

    def _call(self, function: Callable[[Any], Any]) -> None:
        function(self.trainer)


class IterationTimer(HookBase):
    """Stores the ``time`` of each step but the first ``warmup_iter`` - 1; to be the first hook."""

    def __init__(self, warmup_iter: int = 3) -> None:
        self._warmup_iter = warmup_iter
        self._start = time.perf_counter()

    def before_step(self) -> None:
        self._step_start = time.perf_counter()

    def after_step(self) -> None:
        if self.trainer.iter - self.trainer.start_iter >= self._warmup_iter - 1:
            self.trainer.storage.put_scalar("time", time.perf_counter() - self._step_start)
        else:
            self._start = time.perf_counter()

    def after_train(self) -> None:
        logger = logging.getLogger(__name__)
        history = self.trainer.storage.histories().get("time")
        seconds = [value for value, _ in history.values()] if history else []
        on_steps, total = sum(seconds), time.perf_counter() - self._start
        durations = [timedelta(seconds=int(x)) for x in (on_steps, total, total - on_steps)]
        text = "Overall training speed: %d iterations in %s (%.4f s / it)"
        logger.info(text, len(seconds), durations[0], on_steps / max(len(seconds), 1))
        logger.info("Total training time: %s (%s on hooks)", *durations[1:])


class PeriodicWriter(HookBase):
    """Runs writers every ``period`` iterations, at the last one, and before closing them."""

    def __init__(self, writers: list[EventWriter], period: int = 20) -> None:
        self._writers, self._period = writers, period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            writer.write()  # other hooks may have put something after the training
            writer.close()


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """fvcore's PeriodicCheckpointer as a hook; the trainer says where the training ends."""

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


class EvalHook(HookBase):
    """Evaluates every ``eval_period`` (if any) iterations and after a training that succeeded.

    ``eval_function`` returns None or a nested dict of numbers, stored under keys joined by "/".
    """

    def __init__(self, eval_period: int, eval_function: Callable[[], Any]) -> None:
        self._period, self._func = eval_period, eval_function

    def _do_eval(self) -> None:
        flat = flatten_results_dict(self._func() or {})
        for name, value in flat.items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
        comm.synchronize()  # evaluation may take longer on some processes

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._do_eval()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._do_eval()
        del self._func  # a closure over the trainer would keep it alive


class BestCheckpointer(EvalHook):
    """Saves the model when a metric such as "bbox/AP50" improves; to follow its EvalHook."""

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ) -> None:
        super().__init__(eval_period, self._compare_and_save)
        assert mode in ("max", "min"), f"mode is 'max' or 'min', not {mode!r}."
        self._checkpointer, self._file_prefix = checkpointer, file_prefix
        self._metric, self._sign = val_metric, 1 if mode == "max" else -1
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def _compare_and_save(self) -> None:
        logger, latest = logging.getLogger(__name__), self.trainer.storage.latest()
        if self._metric not in latest:
            logger.warning("There is no metric %s to choose a checkpoint by.", self._metric)
            return
        value, iteration = latest[self._metric]
        best = -math.inf if self.best_metric is None else self._sign * self.best_metric
        if not math.isfinite(value) or self._sign * value <= best:
            logger.info("Not saved: %s is %.5f, best %s", self._metric, value, self.best_metric)
            return
        self.best_metric, self.best_iter = value, iteration
        self._checkpointer.save(self._file_prefix, iteration=iteration)
        logger.info("Saved the best model: %s is %.5f @ %d", self._metric, value, iteration)


class LRScheduler(HookBase):
    """Stores the rate that an iteration used as ``lr``, then steps a schedule: one of torch, or a
    ParamScheduler of fvcore over the whole training. The default optimizer is the trainer's.
    """

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        self._optimizer, self.scheduler = optimizer, scheduler

    def before_train(self) -> None:
        self._optimizer = self._optimizer or self.trainer.optimizer
        if isinstance(self.scheduler, ParamScheduler):
            max_iter, last_iter = self.trainer.max_iter, self.trainer.iter - 1
            self.scheduler = LRMultiplier(self._optimizer, self.scheduler, max_iter, last_iter)
        # Reported is the largest group, or one with the commonest rate if all hold one parameter.
        groups = self._optimizer.param_groups
        sizes, rates = [len(group["params"]) for group in groups], [group["lr"] for group in groups]
        commonest = rates.index(Counter(rates).most_common(1)[0][0])
        self._best_param_group_id = sizes.index(max(sizes)) if max(sizes) > 1 else commonest

    def after_step(self) -> None:
        rate = self._optimizer.param_groups[self._best_param_group_id]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {} if isinstance(self.scheduler, ParamScheduler) else self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not isinstance(self.scheduler, ParamScheduler):
            self.scheduler.load_state_dict(state_dict)
