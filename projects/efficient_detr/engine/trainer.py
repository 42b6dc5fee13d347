"""The training step: autocast, gradient scaling, gradient clipping, a check of every loss."""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from efficient_detr.data.seeding import ITERATION_STREAM, derive_seed, seed_everything
from efficient_detr.errors import NonFiniteLossError, UserError

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Trainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` for DETR models, on CPU and GPU.

    One step: losses under autocast, a check that each is finite, backward, clipping of the gradient
    to an L2 norm, optimizer step. float16 needs loss scaling, because small gradients would vanish;
    bfloat16 has the range of float32 and needs none.

    Args:
        model: returns a dict of losses in training.
        data_loader: endless iterable of batches. If it has ``state_dict``, its state is saved too.
        optimizer: optimizer of the model's parameters.
        clip_max_norm: largest L2 norm of the whole gradient; 0 does not clip.
        amp_dtype: ``torch.float16`` or ``torch.bfloat16`` for mixed precision, None for none.
        seed: seed of the random numbers drawn inside the steps, >= 0.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        clip_max_norm: float = 0.1,
        amp_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.clip_max_norm = clip_max_norm
        self.amp_dtype = amp_dtype
        self.seed = seed
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=amp_dtype == torch.float16
        )
        logging.getLogger("detectron2.engine.train_loop").addFilter(_without_user_errors)

    def run_step(self) -> None:
        """One iteration of training.

        Raises:
            NonFiniteLossError: if a loss is infinite or NaN; the weights are left as they were.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        # After the loader, which may draw random numbers too. Denoising noise and dropout then
        # depend on the iteration alone and need no generator state in a checkpoint.
        seed_everything(derive_seed(self.seed, ITERATION_STREAM, self.iter, comm.get_rank()))
        losses = self._forward(batch)
        self._check_losses(losses, batch)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(_total(losses)).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self._clip_gradient(batch)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def after_train(self) -> None:
        """Stop the loader's workers, which would go on preparing batches during the evaluation."""
        self._data_loader_iter_obj = None
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, optimizer, gradient scaler, seed and state of the data loader."""
        state: dict[str, Any] = super().state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        state["seed"] = self.seed
        if hasattr(self.data_loader, "state_dict"):
            state["data_loader"] = self.data_loader.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved; a scaler of another precision is left out."""
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        if "data_loader" in state_dict and hasattr(self.data_loader, "load_state_dict"):
            self.data_loader.load_state_dict(state_dict["data_loader"])

    def _forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        enabled = self.amp_dtype is not None
        with torch.autocast(self.device_type, dtype=self.amp_dtype, enabled=enabled):
            losses = self.model(batch)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _check_losses(self, losses: Mapping[str, Tensor], batch: list[dict[str, Any]]) -> None:
        # One transfer from the GPU for all losses.
        values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
        for name, value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(self._non_finite(f"loss '{name}'", value, batch))

    def _clip_gradient(self, batch: list[dict[str, Any]]) -> None:
        if not self.clip_max_norm:
            return
        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip_max_norm).item()
        if math.isfinite(norm):
            get_event_storage().put_scalar("grad_norm", norm)
        # Under loss scaling it only means that the scale is too high: the scaler skips the step.
        elif not self.grad_scaler.is_enabled():
            raise NonFiniteLossError(self._non_finite("gradient norm", norm, batch))

    def _non_finite(self, what: str, value: float, batch: list[dict[str, Any]]) -> str:
        images = ", ".join(f"{x.get('image_id')} ({x.get('file_name')})" for x in batch)
        return (
            f"The {what} is {value} at iteration {self.iter}, with the images {images}: lower "
            "optimizer.lr, switch train.amp.enabled off, or look at the boxes of these images."
        )


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([loss.float() for loss in losses.values()]).sum()


def _without_user_errors(record: logging.LogRecord) -> bool:
    """Detectron2 logs a traceback of each exception; a UserError is shown as a sentence instead."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))
