"""The training loop."""

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn


class HookBase:
    """Something to do at fixed points of the training loop; ``trainer`` is a weak reference.

    Hooks with a state have ``state_dict`` and ``load_state_dict``.
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
        self.iter = self.start_iter = 0
        self._hooks: list[Any] = []

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
        self.iter, self.start_iter, self.max_iter = start_iter, start_iter, max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.storage.iter = self.iter
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter += 1  # tells the hooks that the training did not fail
            except Exception:
                logger.exception("Exception during training:")
                raise
            finally:
                self.storage.iter = self.iter
                self.after_train()

    def _run_hooks(self, moment: str) -> None:
        for hook in self._hooks:
            getattr(hook, moment)()

    def before_train(self) -> None:
        self._run_hooks("before_train")

    def after_train(self) -> None:
        self._run_hooks("after_train")

    def before_step(self) -> None:
        self._run_hooks("before_step")

    def after_backward(self) -> None:  # for run_step to call
        self._run_hooks("after_backward")

    def after_step(self) -> None:
        self._run_hooks("after_step")

    def run_step(self) -> None:
        raise NotImplementedError

    def _hooks_by_class(self) -> dict[str, Any]:
        return {type(hook).__qualname__: hook for hook in reversed(self._hooks)}

    def state_dict(self) -> dict[str, Any]:
        """The iteration, and the hooks' states by the names of their classes."""
        hooks = self._hooks_by_class()
        states = {name: state for name, hook in hooks.items() if (state := hook.state_dict())}
        return {"iteration": self.iter, **({"hooks": states} if states else {})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.iter = state_dict["iteration"]
        hooks = self._hooks_by_class()
        for name, state in state_dict.get("hooks", {}).items():
            if name in hooks:
                hooks[name].load_state_dict(state)
            else:
                logging.getLogger(__name__).warning("No hook takes the state of '%s'.", name)


class SimpleTrainer(TrainerBase):
    """Trains a model, which returns a loss or a dict of losses to add, with one optimizer.

    Losses are gathered from all processes every ``gather_metric_period`` iterations. Gradients are
    cleared after the forward pass, or before it with ``zero_grad_before_forward``.
    """

    _autocast_type: torch.dtype | None = None

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
    ) -> None:
        super().__init__()
        model.train()
        self.model, self.data_loader, self.optimizer = model, data_loader, optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        # Without autocast it hands everything through.
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=self._autocast_type is not None)
        self._data_loader_iter_obj: Iterator[Any] | None = None

    @property
    def _data_loader_iter(self) -> Iterator[Any]:
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable[Any]]) -> None:
        """Drops the data loader, then takes the one that the function builds."""
        del self.data_loader
        self.data_loader, self._data_loader_iter_obj = data_loader_builder(), None

    def run_step(self) -> None:
        assert self.model.training, f"[{type(self).__name__}] model was changed to eval mode!"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        dtype = self._autocast_type
        with torch.autocast("cuda", dtype) if dtype else contextlib.nullcontext():
            loss_dict = self.model(data)
            if isinstance(loss_dict, torch.Tensor):
                loss_dict = {"total_loss": loss_dict}
            losses = sum(loss_dict.values())
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        self.grad_scaler.scale(losses).backward()
        self.after_backward()
        if (self.iter + 1) % self.gather_metric_period == 0:
            self._write_metrics(loss_dict, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _write_metrics(self, loss_dict: Mapping[str, Any], data_time: float) -> None:
        """Stores the longest loading time and the means of the losses over all processes.

        FloatingPointError if the total loss is infinite or NaN (on the main process).
        """
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time)
        losses = {name: loss.detach().cpu().item() for name, loss in loss_dict.items()}
        gathered = comm.gather((losses, data_time))
        if not comm.is_main_process():
            return
        storage.put_scalar("data_time", max(seconds for _, seconds in gathered))
        means = {name: np.mean([losses[name] for losses, _ in gathered]) for name in losses}
        total = sum(means.values())
        if not np.isfinite(total):
            message = f"Loss became infinite or NaN at iteration {self.iter}: {means}"
            raise FloatingPointError(message)
        storage.put_scalar("total_loss", total)
        if len(means) > 1:
            storage.put_scalars(**means)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])


class AMPTrainer(SimpleTrainer):
    """SimpleTrainer with float16 autocast and loss scaling, on CUDA."""

    _autocast_type = torch.float16

    def run_step(self) -> None:
        assert torch.cuda.is_available(), "[AMPTrainer] CUDA is required for AMP training!"
        super().run_step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
