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
        warmup_method: "linear" up to the schedule's value, or "constant".
        rescale_interval: whether the whole schedule is squeezed into the time after the warm-up;
            otherwise it keeps its clock and its first part is never seen.

    Raises:
        ValueError: another warm-up method.
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
        super().__init__(
            [warmup, scheduler],
            lengths=[warmup_length, 1 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class LRMultiplier(LRScheduler):
    """Gives every parameter group, at iteration i, its base rate times multiplier(i / max_iter).

    Args:
        optimizer: its rates at construction are the base rates.
        multiplier: schedule over the whole training.
        max_iter: number of iterations of the whole training.
        last_iter: the last iteration that was done, -1 at the start.

    Raises:
        ValueError: the multiplier is no schedule of fvcore.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        multiplier: ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ) -> None:
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(
                f"multiplier has to be a ParamScheduler of fvcore, not {multiplier!r}."
            )
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict[str, Any]:
        """Base rates and the count of steps; the schedule itself has no state."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[Any]:
        """The rate of each parameter group."""
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base_rate * factor for base_rate in self.base_lrs]
