"""The training loop."""

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn
from torch.nn.parallel import DataParallel


class HookBase:
    """Something to do at fixed points of the training loop; ``trainer`` is a weak reference.

    Longer work belongs to ``after_step``: ``before_step`` counts as part of a step's time. Hooks
    with a state have ``state_dict`` and ``load_state_dict``.
    """

    trainer: Any = None

    def before_train(self) -> None: ...

    def after_train(self) -> None: ...  # also when the training failed

    def before_step(self) -> None: ...

    def after_backward(self) -> None: ...  # before the optimizer's step

    def after_step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}


class TrainerBase:
    """A loop with hooks; subclasses say in :meth:`run_step` what an iteration does.

    ``iter`` is the current iteration, and ``max_iter`` once the training has succeeded; ``storage``
    is the EventStorage of the training.
    """

    max_iter: int
    storage: EventStorage

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self.iter = self.start_iter = 0

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Appends hooks, which run in this order; None is left out."""
        for hook in hooks:
            if hook is not None:
                assert isinstance(hook, HookBase), f"{hook!r} is not a HookBase."
                hook.trainer = weakref.proxy(self)  # the trainer owns its hooks
                self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Runs the iterations from ``start_iter`` up to, not including, ``max_iter``."""
        logger = logging.getLogger(__name__)
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter += 1  # tells the hooks that the training did not fail
            except Exception:
                logger.exception("Exception during training:")
                raise
            finally:
                self.after_train()

    def _run_hooks(self, moment: str) -> None:
        for hook in self._hooks:
            getattr(hook, moment)()

    def before_train(self) -> None:
        self._run_hooks("before_train")

    def after_train(self) -> None:
        self.storage.iter = self.iter
        self._run_hooks("after_train")

    def before_step(self) -> None:
        self.storage.iter = self.iter
        self._run_hooks("before_step")

    def after_backward(self) -> None:
        """For :meth:`run_step` to call."""
        self._run_hooks("after_backward")

    def after_step(self) -> None:
        self._run_hooks("after_step")

    def run_step(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The iteration, and the states of the hooks by the names of their classes."""
        hooks = reversed(self._hooks)  # of hooks of one class, the first counts
        states = {type(hook).__qualname__: s for hook in hooks if (s := hook.state_dict())}
        return {"iteration": self.iter, **({"hooks": states} if states else {})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.iter = state_dict["iteration"]
        hooks = {type(hook).__qualname__: hook for hook in reversed(self._hooks)}
        for name, state in state_dict.get("hooks", {}).items():
            if name in hooks:
                hooks[name].load_state_dict(state)
            else:
                logging.getLogger(__name__).warning("No hook takes the state of '%s'.", name)


class SimpleTrainer(TrainerBase):
    """Trains one model on the sum of its losses, with one optimizer and one data loader.

    Args:
        model: maps what the loader yields to a loss or a dict of losses; set to training mode.
        data_loader: an iterable; its iterator is made at the first step.
        optimizer: an optimizer.
        gather_metric_period: losses are gathered from all processes every so many iterations.
        zero_grad_before_forward: whether gradients are cleared before or after the forward pass.
        async_write_metrics: whether losses are gathered in a thread of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self._data_loader_iter_obj: Iterator[Any] | None = None
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self.async_write_metrics = async_write_metrics
        self.concurrent_executor = ThreadPoolExecutor(max_workers=1)  # one keeps the order

    def run_step(self) -> None:
        assert self.model.training, f"[{type(self).__name__}] model was changed to eval mode!"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        with self._precision_context():
            loss_dict = self.model(data)
            if isinstance(loss_dict, torch.Tensor):
                loss_dict = {"total_loss": loss_dict}
            losses = sum(loss_dict.values())
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        self._backward(losses)
        self.after_backward()
        if self.async_write_metrics:
            arguments = (loss_dict, data_time, "", self.iter)
            self.concurrent_executor.submit(self._write_metrics, *arguments)
        else:
            self._write_metrics(loss_dict, data_time)
        self._update_model()

    def _precision_context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def _backward(self, losses: Any) -> None:
        losses.backward()

    def _update_model(self) -> None:
        self.optimizer.step()

    @property
    def _data_loader_iter(self) -> Iterator[Any]:
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable[Any]]) -> None:
        """Drops the data loader, then takes the one that the function builds."""
        del self.data_loader
        self.data_loader = data_loader_builder()
        self._data_loader_iter_obj = None

    def _write_metrics(
        self,
        loss_dict: Mapping[str, Any],
        data_time: float,
        prefix: str = "",
        iter: int | None = None,
    ) -> None:
        iteration = self.iter if iter is None else iter
        if (iteration + 1) % self.gather_metric_period == 0:
            try:
                SimpleTrainer.write_metrics(loss_dict, data_time, iteration, prefix)
            except Exception:  # a thread would keep it to itself
                logging.getLogger(__name__).exception("Exception in writing metrics: ")
                raise

    @staticmethod
    def write_metrics(
        loss_dict: Mapping[str, Any], data_time: float, cur_iter: int, prefix: str = ""
    ) -> None:
        """Stores the longest loading time and the means of the losses over all processes.

        FloatingPointError if the total loss is infinite or NaN (on the main process).
        """
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time, cur_iter=cur_iter)
        losses = {name: loss.detach().cpu().item() for name, loss in loss_dict.items()}
        gathered = comm.gather((losses, data_time))
        if not comm.is_main_process():
            return
        storage.put_scalar("data_time", max(seconds for _, seconds in gathered), cur_iter=cur_iter)
        means = {name: np.mean([losses[name] for losses, _ in gathered]) for name in losses}
        total = sum(means.values())
        if not np.isfinite(total):
            raise FloatingPointError(
                f"Loss became infinite or NaN at iteration {cur_iter}: {means}"
            )
        storage.put_scalar(f"{prefix}total_loss", total, cur_iter=cur_iter)
        if len(means) > 1:
            storage.put_scalars(cur_iter=cur_iter, **means)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])

    def after_train(self) -> None:
        super().after_train()
        self.concurrent_executor.shutdown(wait=True)


class AMPTrainer(SimpleTrainer):
    """SimpleTrainer in the lower ``precision``, on CUDA, with gradient scaling.

    ``log_grad_scaler`` stores the scale as "[metric]grad_scaler".
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        grad_scaler: Any = None,
        precision: torch.dtype = torch.float16,
        log_grad_scaler: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        several = (
            isinstance(model, DataParallel) or len(getattr(model, "device_ids", None) or []) > 1
        )
        assert not several, "AMPTrainer does not support several devices in one process."
        period, before = gather_metric_period, zero_grad_before_forward
        super().__init__(model, data_loader, optimizer, period, before, async_write_metrics)
        self.grad_scaler = grad_scaler or torch.amp.GradScaler("cuda")
        self.precision = precision
        self.log_grad_scaler = log_grad_scaler

    def run_step(self) -> None:
        assert torch.cuda.is_available(), "[AMPTrainer] CUDA is required for AMP training!"
        super().run_step()

    def _precision_context(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cuda", dtype=self.precision)

    def _backward(self, losses: Any) -> None:
        self.grad_scaler.scale(losses).backward()
        if self.log_grad_scaler:
            self.storage.put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())

    def _update_model(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
