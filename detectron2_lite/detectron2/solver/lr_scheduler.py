"""Learning rates from fvcore's schedules, which map progress in [0, 1] to a multiplier."""

from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["LRMultiplier", "LRScheduler", "WarmupParamScheduler"]


class WarmupParamScheduler(CompositeParamScheduler):
    """Puts a warm-up before another schedule.

    Args:
        scheduler: the schedule to follow after the warm-up.
        warmup_factor: the warm-up starts at this fraction of ``scheduler(0)``.
        warmup_length: its share of the whole training, in [0, 1].
        warmup_method: "linear" up to the schedule's value, or "constant"; else ValueError.
        rescale_interval: whether the schedule is squeezed into the time after the warm-up, instead
            of being cut by it.
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ) -> None:
        start = warmup_factor * scheduler(0.0)
        if warmup_method == "linear":
            end = scheduler(0.0 if rescale_interval else warmup_length)
            warmup: ParamScheduler = LinearParamScheduler(start, end)
        elif warmup_method == "constant":
            warmup = ConstantParamScheduler(start)
        else:
            raise ValueError(f"warmup_method is 'linear' or 'constant', not {warmup_method!r}.")
        scaling = ["rescaled", "rescaled" if rescale_interval else "fixed"]
        super().__init__([warmup, scheduler], [warmup_length, 1 - warmup_length], scaling)


class LRMultiplier(LRScheduler):
    """Gives each parameter group, at iteration i, its first rate times multiplier(i / max_iter).

    ``multiplier`` is a ParamScheduler of fvcore (else ValueError), ``last_iter`` the last iteration
    that was done.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        multiplier: ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ) -> None:
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(f"multiplier has to be a ParamScheduler, not {multiplier!r}.")
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict[str, Any]:
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[Any]:
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base_rate * factor for base_rate in self.base_lrs]
