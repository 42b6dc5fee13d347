"""The hooks of most trainings."""

import datetime
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer

from detectron2._absent import absent_name_getter
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.solver import LRScheduler as _LRScheduler
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

__all__ = [
    "CallbackHook",
    "IterationTimer",
    "PeriodicWriter",
    "PeriodicCheckpointer",
    "BestCheckpointer",
    "LRScheduler",
    "EvalHook",
    "TorchProfiler",
    "TorchMemoryStats",
]
__getattr__ = absent_name_getter(__name__)


class CallbackHook(HookBase):
    """Calls functions of the trainer, each of them optional."""

    def __init__(
        self,
        *,
        before_train: Callable[[Any], Any] | None = None,
        after_train: Callable[[Any], Any] | None = None,
        before_step: Callable[[Any], Any] | None = None,
        after_step: Callable[[Any], Any] | None = None,
    ) -> None:
        self._functions = {
            "before_train": before_train,
            "after_train": after_train,
            "before_step": before_step,
            "after_step": after_step,
        }

    def _call(self, moment: str) -> None:
        function = self._functions.get(moment)
        if function is not None:
            function(self.trainer)

    def before_train(self) -> None:
        self._call("before_train")

    def after_train(self) -> None:
        self._call("after_train")
        self._functions.clear()  # closures over the trainer would keep it alive

    def before_step(self) -> None:
        self._call("before_step")

    def after_step(self) -> None:
        self._call("after_step")


def _seconds_as_text(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


class IterationTimer(HookBase):
    """Stores the ``time`` of each step but the first ones, and logs a summary at the end.

    It belongs first in the list of hooks. ``warmup_iter`` steps do not count for the summary.
    """

    def __init__(self, warmup_iter: int = 3) -> None:
        self._warmup_iter = warmup_iter
        self._step_timer = Timer()
        self._total_timer = Timer()
        self._start_time = time.perf_counter()

    def _restart(self) -> None:
        self._start_time = time.perf_counter()
        self._total_timer.reset()

    def before_train(self) -> None:
        self._restart()
        self._total_timer.pause()

    def before_step(self) -> None:
        self._step_timer.reset()
        self._total_timer.resume()

    def after_step(self) -> None:
        steps_done = self.trainer.storage.iter + 1 - self.trainer.start_iter
        if steps_done < self._warmup_iter:
            self._restart()
        else:
            self.trainer.storage.put_scalars(time=self._step_timer.seconds())
        self._total_timer.pause()

    def after_train(self) -> None:
        logger = logging.getLogger(__name__)
        total = time.perf_counter() - self._start_time
        on_steps = self._total_timer.seconds()
        steps = self.trainer.storage.iter + 1 - self.trainer.start_iter - self._warmup_iter
        if steps > 0 and on_steps > 0:
            logger.info(
                "Overall training speed: %d iterations in %s (%.4f s / it)",
                steps,
                _seconds_as_text(on_steps),
                on_steps / steps,
            )
        times = _seconds_as_text(total), _seconds_as_text(total - on_steps)
        logger.info("Total training time: %s (%s on hooks)", *times)


class PeriodicWriter(HookBase):
    """Runs writers every ``period`` iterations, at the last one, and before closing them."""

    def __init__(self, writers: list[EventWriter], period: int = 20) -> None:
        for writer in writers:
            assert isinstance(writer, EventWriter), f"{writer!r} is not an EventWriter."
        self._writers = writers
        self._period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            writer.write()  # other hooks may have put something in their after_train
            writer.close()


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """fvcore's PeriodicCheckpointer as a hook; the trainer says where the training ends."""

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


def _is_evaluation_due(trainer: Any, period: int) -> bool:
    """Whether EvalHook evaluates after this step; the last evaluation waits for after_train."""
    done = trainer.iter + 1
    return period > 0 and done % period == 0 and done != trainer.max_iter


class EvalHook(HookBase):
    """Evaluates every ``eval_period`` iterations and after a training that did not fail.

    Args:
        eval_period: 0 evaluates only at the end.
        eval_function: returns a nested dict of numbers, stored under keys joined by "/".
        eval_after_train: whether to evaluate at the end.
    """

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], Mapping[str, Any] | None],
        eval_after_train: bool = True,
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
                    raise ValueError(
                        f"[EvalHook] eval_function returned {name}: {value!r}, which is no number."
                    ) from error
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        comm.synchronize()  # evaluation may take longer on some processes

    def after_step(self) -> None:
        if _is_evaluation_due(self.trainer, self._period):
            self._do_eval()

    def after_train(self) -> None:
        if self._eval_after_train and self.trainer.iter + 1 >= self.trainer.max_iter:
            self._do_eval()
        del self._func  # a closure over the trainer would keep it alive


class BestCheckpointer(HookBase):
    """Saves the model whenever a metric gets better; registered after the hook that measures it.

    Args:
        eval_period: the period of that EvalHook.
        checkpointer: what saves the model.
        val_metric: name of the metric, such as "bbox/AP50".
        mode: "max" or "min", what is better.
        file_prefix: name of the file.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ) -> None:
        assert mode in ("max", "min"), f"mode is 'max' or 'min', not {mode!r}."
        self._period = eval_period
        self._checkpointer = checkpointer
        self._val_metric = val_metric
        self._sign = 1 if mode == "max" else -1
        self._file_prefix = file_prefix
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def _compare_and_save(self) -> None:
        logger = logging.getLogger(__name__)
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            logger.warning("There is no metric %s to choose a checkpoint by.", self._val_metric)
            return
        value, iteration = latest
        is_first = self.best_metric is None
        best = -math.inf if is_first else self._sign * self.best_metric
        if not math.isfinite(value) or self._sign * value <= best:
            logger.info("Not saved: %s is %.5f, best %s", self._val_metric, value, self.best_metric)
            return
        self.best_metric, self.best_iter = value, iteration
        self._checkpointer.save(self._file_prefix, iteration=iteration)
        logger.info("Saved the best model: %s is %.5f @ %d", self._val_metric, value, iteration)

    def after_step(self) -> None:
        if _is_evaluation_due(self.trainer, self._period):
            self._compare_and_save()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._compare_and_save()


class LRScheduler(HookBase):
    """Steps a schedule after each iteration and stores the rate that the iteration used as ``lr``.

    Args:
        optimizer: the trainer's by default.
        scheduler: a scheduler of torch, or a ParamScheduler of fvcore as multiplier over the whole
            training; the trainer's by default.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: _LRScheduler | ParamScheduler | None = None,
    ) -> None:
        self._optimizer: Any = optimizer
        self._scheduler: Any = scheduler

    @property
    def scheduler(self) -> Any:
        """The schedule in use."""
        return self._scheduler or self.trainer.scheduler

    def before_train(self) -> None:
        self._optimizer = self._optimizer or self.trainer.optimizer
        if isinstance(self.scheduler, ParamScheduler):
            self._scheduler = LRMultiplier(
                self._optimizer,
                self.scheduler,
                self.trainer.max_iter,
                last_iter=self.trainer.iter - 1,
            )
        self._best_param_group_id = self.get_best_param_group_id(self._optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """Index of the group to report: the largest, or one with the commonest rate if all groups
        hold a single parameter."""
        groups = optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        rate = self._optimizer.param_groups[self._best_param_group_id]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, if it has one."""
        return self.scheduler.state_dict() if isinstance(self.scheduler, _LRScheduler) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of the schedule, if it has one."""
        if isinstance(self.scheduler, _LRScheduler):
            logging.getLogger(__name__).info("Loading scheduler from state_dict ...")
            self.scheduler.load_state_dict(state_dict)


class TorchProfiler(HookBase):
    """Profiles single steps with :class:`torch.profiler.profile`.

    Args:
        enable_predicate: says of the trainer whether to profile the coming step.
        output_dir: where the traces go.
        activities: as for the profiler.
        save_tensorboard: whether traces are written for TensorBoard, into ``output_dir/log``, or
            as ``output_dir/profiler-trace-iter<N>.json`` for chrome://tracing.
    """

    def __init__(
        self,
        enable_predicate: Callable[[Any], bool],
        output_dir: str,
        *,
        activities: Iterable[torch.profiler.ProfilerActivity] | None = None,
        save_tensorboard: bool = True,
    ) -> None:
        self._enable_predicate = enable_predicate
        self._output_dir = output_dir
        self._activities = activities
        self._save_tensorboard = save_tensorboard
        self._profiler: torch.profiler.profile | None = None

    def before_step(self) -> None:
        if not self._enable_predicate(self.trainer):
            return
        folder = f"log/profiler-tensorboard-iter{self.trainer.iter}"
        on_trace_ready = torch.profiler.tensorboard_trace_handler(
            os.path.join(self._output_dir, folder), f"worker{comm.get_rank()}"
        )
        self._profiler = torch.profiler.profile(
            activities=self._activities,
            on_trace_ready=on_trace_ready if self._save_tensorboard else None,
            record_shapes=True,
            profile_memory=True,
            with_stack=True,
            with_flops=True,
        )
        self._profiler.start()

    def after_step(self) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        if not self._save_tensorboard:
            os.makedirs(self._output_dir, exist_ok=True)
            file_name = f"profiler-trace-iter{self.trainer.iter}.json"
            self._profiler.export_chrome_trace(os.path.join(self._output_dir, file_name))
        self._profiler = None


class TorchMemoryStats(HookBase):
    """Logs CUDA's memory use every ``period`` iterations, at most ``max_runs`` times."""

    def __init__(self, period: int = 20, max_runs: int = 10) -> None:
        self._period = period
        self._runs_left = max_runs

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_due = done % self._period == 0 or done == self.trainer.max_iter
        if not is_due or self._runs_left <= 0 or not torch.cuda.is_available():
            return
        self._runs_left -= 1
        measures = ("max_memory_reserved", "memory_reserved", "max_memory_allocated")
        sizes = (f"{name}: {getattr(torch.cuda, name)() / 2**20:.0f}MB" for name in measures)
        logging.getLogger(__name__).info("iter: %d  %s", done - 1, "  ".join(sizes))
        torch.cuda.reset_peak_memory_stats()
