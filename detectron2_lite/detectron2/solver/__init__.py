"""Parameter groups, and learning rates from fvcore's schedules of progress in [0, 1]."""

from typing import Any

from detectron2._absent import absence_message
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupParamScheduler(CompositeParamScheduler):
    """Puts a linear warm-up, of the share ``warmup_length`` of the whole training, before another
    schedule: from ``warmup_factor`` times ``scheduler(0)`` to the schedule's value at its end.
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
    ) -> None:
        if warmup_method != "linear":
            raise ValueError(absence_message(f"The warm-up method {warmup_method!r}"))
        warmup = LinearParamScheduler(warmup_factor * scheduler(0.0), scheduler(warmup_length))
        lengths = [warmup_length, 1 - warmup_length]
        super().__init__([warmup, scheduler], lengths, ["rescaled", "fixed"])


class LRMultiplier(LRScheduler):
    """Gives each parameter group, at iteration i, its first rate times multiplier(i / max_iter).

    ``multiplier`` is a ParamScheduler of fvcore (else ValueError), ``last_iter`` the last iteration
    that was done.
    """

    def __init__(
        self, optimizer: Optimizer, multiplier: ParamScheduler, max_iter: int, last_iter: int = -1
    ) -> None:
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(f"multiplier has to be a ParamScheduler, not {multiplier!r}.")
        self._multiplier, self._max_iter = multiplier, max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict[str, Any]:
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[Any]:
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base_rate * factor for base_rate in self.base_lrs]
