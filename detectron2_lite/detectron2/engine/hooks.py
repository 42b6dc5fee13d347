"""The hooks of most trainings."""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from detectron2._absent import absent_name_getter
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.solver import LRScheduler as _LRScheduler
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from fvcore.common.param_scheduler import ParamScheduler

from .train_loop import HookBase

# fmt: off
__all__ = [
    "BestCheckpointer", "CallbackHook", "EvalHook", "IterationTimer", "LRScheduler",
    "PeriodicCheckpointer", "PeriodicWriter", "TorchMemoryStats", "TorchProfiler",
]
# fmt: on
__getattr__ = absent_name_getter(__name__)
_Callback = Callable[[Any], Any] | None
_PROFILER_OPTIONS = ("record_shapes", "profile_memory", "with_stack", "with_flops")


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
    """Stores the ``time`` of each step but the first ``warmup_iter`` - 1, and logs the total.

    It belongs first in the list of hooks.
    """

    def __init__(self, warmup_iter: int = 3) -> None:
        self._warmup_iter = warmup_iter
        self.before_train()

    def before_train(self) -> None:
        self._start, self._seconds_on_steps = time.perf_counter(), 0.0

    def before_step(self) -> None:
        self._step_start = time.perf_counter()

    def after_step(self) -> None:
        if self._timed_steps() > 0:
            seconds = time.perf_counter() - self._step_start
            self.trainer.storage.put_scalars(time=seconds)
            self._seconds_on_steps += seconds
        else:
            self.before_train()

    def _timed_steps(self) -> int:
        return self.trainer.storage.iter + 2 - self.trainer.start_iter - self._warmup_iter

    def after_train(self) -> None:
        logger = logging.getLogger(__name__)
        steps, on_steps = self._timed_steps() - 1, self._seconds_on_steps
        total = time.perf_counter() - self._start
        if steps > 0 and on_steps > 0:
            duration, speed = timedelta(seconds=int(on_steps)), on_steps / steps
            text = "Overall training speed: %d iterations in %s (%.4f s / it)"
            logger.info(text, steps, duration, speed)
        durations = [timedelta(seconds=int(seconds)) for seconds in (total, total - on_steps)]
        logger.info("Total training time: %s (%s on hooks)", *durations)


class PeriodicWriter(HookBase):
    """Runs writers every ``period`` iterations, at the last one, and before closing them."""

    def __init__(self, writers: list[EventWriter], period: int = 20) -> None:
        assert all(isinstance(writer, EventWriter) for writer in writers), writers
        self._writers = writers
        self._period = period

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

    ``eval_function`` returns a nested dict of numbers, stored under keys joined by "/".
    """

    def __init__(
        self, eval_period: int, eval_function: Callable[[], Any], eval_after_train: bool = True
    ) -> None:
        self._period = eval_period
        self._func = eval_function
        self._eval_after_train = eval_after_train

    def _do_eval(self) -> None:
        results = self._func()
        if results:
            assert isinstance(results, dict), f"eval_function returned no dict, but {results!r}."
            flat = flatten_results_dict(results)
            for name, value in flat.items():
                try:
                    float(value)
                except (TypeError, ValueError) as error:
                    message = f"eval_function returned {name}: {value!r}, which is no number."
                    raise ValueError(message) from error
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        comm.synchronize()  # evaluation may take longer on some processes

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._do_eval()

    def after_train(self) -> None:
        if self._eval_after_train and self.trainer.iter + 1 >= self.trainer.max_iter:
            self._do_eval()
        del self._func  # a closure over the trainer would keep it alive


class BestCheckpointer(EvalHook):
    """Saves the model when a metric such as "bbox/AP50" improves ("max" or "min" is better).

    It belongs after the EvalHook with the same period.
    """

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
        self._checkpointer = checkpointer
        self._metric = val_metric
        self._sign = 1 if mode == "max" else -1
        self._file_prefix = file_prefix
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def _compare_and_save(self) -> None:
        logger = logging.getLogger(__name__)
        if self._metric not in self.trainer.storage.latest():
            logger.warning("There is no metric %s to choose a checkpoint by.", self._metric)
            return
        value, iteration = self.trainer.storage.latest()[self._metric]
        best = -math.inf if self.best_metric is None else self._sign * self.best_metric
        if not math.isfinite(value) or self._sign * value <= best:
            logger.info("Not saved: %s is %.5f, best %s", self._metric, value, self.best_metric)
            return
        self.best_metric, self.best_iter = value, iteration
        self._checkpointer.save(self._file_prefix, iteration=iteration)
        logger.info("Saved the best model: %s is %.5f @ %d", self._metric, value, iteration)


class LRScheduler(HookBase):
    """Steps a schedule after each iteration and stores the rate that the iteration used as ``lr``.

    The scheduler is one of torch, or a ParamScheduler of fvcore that multiplies the rates over the
    whole training. By default scheduler and optimizer are the trainer's.
    """

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler

    @property
    def scheduler(self) -> Any:
        return self._scheduler or self.trainer.scheduler

    def before_train(self) -> None:
        self._optimizer = self._optimizer or self.trainer.optimizer
        if isinstance(self.scheduler, ParamScheduler):
            max_iter, last_iter = self.trainer.max_iter, self.trainer.iter - 1
            self._scheduler = LRMultiplier(self._optimizer, self.scheduler, max_iter, last_iter)
        self._best_param_group_id = self.get_best_param_group_id(self._optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """The largest group, or one with the commonest rate if all hold a single parameter."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in optimizer.param_groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        rate = self._optimizer.param_groups[self._best_param_group_id]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict() if isinstance(self.scheduler, _LRScheduler) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if isinstance(self.scheduler, _LRScheduler):
            self.scheduler.load_state_dict(state_dict)


class TorchProfiler(HookBase):
    """Profiles the steps that ``enable_predicate(trainer)`` chooses.

    Traces go to ``output_dir/log`` for TensorBoard, or, without ``save_tensorboard``, to
    ``output_dir/profiler-trace-iter<N>.json`` for chrome://tracing.
    """

    def __init__(
        self,
        enable_predicate: Callable[[Any], bool],
        output_dir: str,
        *,
        activities: Iterable[Any] | None = None,
        save_tensorboard: bool = True,
    ) -> None:
        self._enable_predicate = enable_predicate
        self._output_dir = output_dir
        self._save_tensorboard = save_tensorboard
        self._options: dict[str, Any] = dict.fromkeys(_PROFILER_OPTIONS, True)
        self._options.update(activities=activities, on_trace_ready=self._write_trace)
        self._profiler: Any = None

    def before_step(self) -> None:
        if self._enable_predicate(self.trainer):
            self._profiler = torch.profiler.profile(**self._options)
            self._profiler.start()

    def _write_trace(self, profiler: Any) -> None:
        iteration, folder = self.trainer.iter, os.path.join(self._output_dir, "log")
        if self._save_tensorboard:
            folder = os.path.join(folder, f"profiler-tensorboard-iter{iteration}")
            name = f"worker{comm.get_rank()}"
            torch.profiler.tensorboard_trace_handler(folder, name)(profiler)
        else:
            os.makedirs(self._output_dir, exist_ok=True)
            name = f"profiler-trace-iter{iteration}.json"
            profiler.export_chrome_trace(os.path.join(self._output_dir, name))

    def after_step(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


class TorchMemoryStats(HookBase):
    """Logs CUDA's memory use every ``period`` iterations, at most ``max_runs`` times."""

    def __init__(self, period: int = 20, max_runs: int = 10) -> None:
        self._period = period
        self._runs_left = max_runs

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_due = done % self._period == 0 or done == self.trainer.max_iter
        if is_due and self._runs_left > 0 and torch.cuda.is_available():
            self._runs_left -= 1
            measures = ("max_memory_reserved", "memory_reserved", "max_memory_allocated")
            sizes = [f"{name}: {getattr(torch.cuda, name)() / 2**20:.0f}MB" for name in measures]
            logging.getLogger(__name__).info("iter: %d  %s", done - 1, "  ".join(sizes))
            torch.cuda.reset_peak_memory_stats()
