"""Schedules and parameter groups."""

from typing import Any

import pytest
import torch
from detectron2.solver import LRMultiplier, WarmupParamScheduler, get_default_optimizer_params
from detectron2.solver.build import reduce_param_groups
from fvcore.common.param_scheduler import LinearParamScheduler, MultiStepParamScheduler
from torch import nn


def _steps() -> MultiStepParamScheduler:
    return MultiStepParamScheduler(values=[1, 0.1], milestones=[8], num_updates=10)


def test_linear_warmup_reaches_the_schedule() -> None:
    # From 0.2 * 1 at 0 to 1 at 0.4, so 0.6 halfway; then the steps, which drop at 0.8.
    schedule = WarmupParamScheduler(_steps(), 0.2, 0.4)
    values = [schedule(where) for where in (0.0, 0.2, 0.4, 0.79, 0.8)]
    assert values == pytest.approx([0.2, 0.6, 1.0, 1.0, 0.1])


def test_constant_warmup_and_unknown_method() -> None:
    schedule = WarmupParamScheduler(_steps(), 0.2, 0.4, "constant")
    assert [schedule(0.0), schedule(0.39), schedule(0.4)] == pytest.approx([0.2, 0.2, 1.0])
    with pytest.raises(ValueError, match="exponential"):
        WarmupParamScheduler(_steps(), 0.2, 0.4, "exponential")


def test_rescaled_schedules_start_after_the_warmup() -> None:
    line = LinearParamScheduler(1.0, 0.0)
    # Cut: at 0.5 the line is at 0.5. Squeezed: it starts there at 1 and is at 0.5 at 0.75.
    assert WarmupParamScheduler(line, 0.0, 0.5)(0.5) == pytest.approx(0.5)
    squeezed = WarmupParamScheduler(line, 0.0, 0.5, rescale_interval=True)
    assert [squeezed(0.25), squeezed(0.5), squeezed(0.75)] == pytest.approx([0.5, 1.0, 0.5])


def _optimizer() -> torch.optim.SGD:
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    return torch.optim.SGD([{"params": [first], "lr": 2.0}, {"params": [second], "lr": 4.0}], lr=1)


def test_rates_keep_their_ratio() -> None:
    optimizer = _optimizer()
    scheduler = LRMultiplier(optimizer, _steps(), max_iter=10)
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates[0] == rates[7] == pytest.approx([2.0, 4.0])
    assert rates[8] == pytest.approx([0.2, 0.4])
    assert scheduler.state_dict() == {"base_lrs": [2.0, 4.0], "last_epoch": 10}


def test_a_loaded_schedule_goes_on() -> None:
    optimizer = _optimizer()
    scheduler = LRMultiplier(optimizer, _steps(), max_iter=10)
    scheduler.load_state_dict({"base_lrs": [1.0, 1.0], "last_epoch": 8})
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_multiplier_is_a_param_scheduler() -> None:
    with pytest.raises(ValueError, match="ParamScheduler"):
        LRMultiplier(_optimizer(), abs, 10)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.shared = self.head
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def _settings(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    by_id = {
        id(p): (group.get("lr"), group.get("weight_decay"))
        for group in groups
        for p in group["params"]
    }
    return {name: by_id[id(p)] for name, p in model.named_parameters() if id(p) in by_id}


def _backbone_factor(name: str) -> float:
    return 0.1 if name.startswith("backbone.") else 1.0


def test_groups_by_layer_name_and_kind() -> None:
    model = Net()
    groups = get_default_optimizer_params(
        model,
        base_lr=1.0,
        weight_decay=0.5,
        weight_decay_norm=0.0,
        weight_decay_bias=0.25,
        bias_lr_factor=2.0,
        lr_factor_func=_backbone_factor,
    )
    assert _settings(model, groups) == {
        "backbone.0.weight": (0.1, 0.5),
        "backbone.0.bias": (2.0, 0.25),
        "backbone.1.weight": (0.1, 0.0),
        "backbone.1.bias": (2.0, 0.25),
        "head.weight": (1.0, 0.5),
        "head.bias": (2.0, 0.25),
        "norm.weight": (1.0, 0.0),
        "norm.bias": (2.0, 0.25),
    }
    assert len(groups) == 5
    assert sum(len(group["params"]) for group in groups) == 8, "shared once, frozen never"


def test_without_settings_there_is_one_plain_group() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert get_default_optimizer_params(model) == [{"params": list(model.parameters())}]


def test_overrides_win_by_name() -> None:
    model = nn.Linear(2, 2)
    groups = get_default_optimizer_params(model, base_lr=1.0, overrides={"weight": {"lr": 3.0}})
    assert _settings(model, groups) == {"weight": (3.0, None), "bias": (1.0, None)}


def test_factors_need_a_base_rate() -> None:
    with pytest.raises(ValueError, match="base_lr"):
        get_default_optimizer_params(nn.Linear(1, 1), lr_factor_func=_backbone_factor)


def test_reducing_keeps_the_latest_settings_and_the_names() -> None:
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    reduced = reduce_param_groups(
        [
            {"params": [a, b, c], "param_names": ["a", "b", "c"], "lr": 1.0},
            {"params": [b], "param_names": ["b"], "lr": 2.0},
        ]
    )
    names = [(group["lr"], group["param_names"]) for group in reduced]
    assert names == [(1.0, ["a", "c"]), (2.0, ["b"])]
    assert [[id(p) for p in group["params"]] for group in reduced] == [[id(a), id(c)], [id(b)]]


def test_bias_has_one_setting() -> None:
    with pytest.raises(ValueError, match="bias"):
        get_default_optimizer_params(nn.Linear(1, 1), weight_decay_bias=0.0, overrides={"bias": {}})
    with pytest.raises(ValueError, match="base_lr"):
        get_default_optimizer_params(nn.Linear(1, 1), bias_lr_factor=2.0)
