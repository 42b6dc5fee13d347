"""Learning rates from fvcore's schedules, which map progress in [0, 1] to a multiplier."""

from typing import Any

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupParamScheduler(CompositeParamScheduler):
    """Puts a warm-up, of the share ``warmup_length`` of the whole training, before a schedule.

    It starts at ``warmup_factor`` times ``scheduler(0)`` and is constant or linear up to the value
    of the schedule, which the warm-up cuts, or with ``rescale_interval`` squeezes.
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ) -> None:
        if warmup_method not in ("linear", "constant"):
            raise ValueError(f"warmup_method is 'linear' or 'constant', not {warmup_method!r}.")
        start = end = warmup_factor * scheduler(0.0)
        if warmup_method == "linear":
            end = scheduler(0.0 if rescale_interval else warmup_length)
        scaling = ["rescaled", "rescaled" if rescale_interval else "fixed"]
        schedules = [LinearParamScheduler(start, end), scheduler]
        super().__init__(schedules, [warmup_length, 1 - warmup_length], scaling)


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
