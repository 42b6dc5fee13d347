"""The training loop, its hooks, and the beginning of a script, on a model of one parameter."""

import argparse
import itertools
import json
import logging
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import (
    AMPTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.utils.events import EventStorage, JSONWriter, get_event_storage
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf
from torch import nn


class Slope(nn.Module):
    """Two losses, w and 2 w of the input's mean: the gradient of w is 3 times that mean."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: torch.Tensor) -> Any:
        return {"loss_a": self.w * x.mean(), "loss_b": 2 * self.w * x.mean()}


def _trainer(model: nn.Module | None = None, kind: Any = SimpleTrainer, **options: Any) -> Any:
    model = model or Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs = torch.ones(2, device=next(model.parameters()).device)
    return kind(model, itertools.repeat(inputs), optimizer, **options)


def _failing_trainer() -> Any:
    class Failing(Slope):
        def forward(self, x: torch.Tensor) -> Any:
            raise RuntimeError("broken step")

    return _trainer(Failing())


class Diary(HookBase):
    def __init__(self) -> None:
        self.entries: list[str] = []

    def before_train(self) -> None:
        self.entries.append("before_train")

    def before_step(self) -> None:
        self.entries.append(f"before_step {self.trainer.iter}")

    def after_backward(self) -> None:
        self.entries.append(f"after_backward, w {self.trainer.model.w.item()}")

    def after_step(self) -> None:
        self.entries.append(f"after_step {self.trainer.storage.iter}")

    def after_train(self) -> None:
        self.entries.append(f"after_train {self.trainer.iter}")


def test_hooks_run_around_each_step() -> None:
    diary = Diary()
    trainer = _trainer()
    trainer.register_hooks([diary, None])
    trainer.train(3, 5)
    # Each step takes 0.5 * 3 from w, after the hook that follows the backward pass.
    assert diary.entries == [
        "before_train",
        "before_step 3",
        "after_backward, w 10.0",
        "after_step 3",
        "before_step 4",
        "after_backward, w 8.5",
        "after_step 4",
        "after_train 5",
    ]
    assert trainer.model.w.item() == pytest.approx(7.0)
    assert (trainer.start_iter, trainer.iter, trainer.max_iter) == (3, 5, 5)


def test_after_train_runs_after_a_failure_too() -> None:
    diary = Diary()
    trainer = _failing_trainer()
    trainer.register_hooks([diary])
    with pytest.raises(RuntimeError, match="broken step"):
        trainer.train(0, 5)
    assert diary.entries[-1] == "after_train 0", "an unfinished training stays below max_iter"


def test_only_hooks_can_be_registered() -> None:
    with pytest.raises(AssertionError):
        _trainer().register_hooks([object()])  # type: ignore[list-item]


def test_metrics_of_a_step() -> None:
    trainer = _trainer()
    trainer.train(0, 1)
    latest = trainer.storage.latest()
    assert set(latest) == {"data_time", "rank_data_time", "total_loss", "loss_a", "loss_b"}
    assert [latest[name] for name in ("loss_a", "loss_b", "total_loss")] == [
        (10.0, 0),
        (20.0, 0),
        (30.0, 0),
    ]


def test_a_single_tensor_is_the_total_loss() -> None:
    class Single(Slope):
        def forward(self, x: torch.Tensor) -> Any:
            return self.w * x.mean()

    trainer = _trainer(Single())
    trainer.train(0, 1)
    assert trainer.storage.latest()["total_loss"] == (10.0, 0)
    assert trainer.model.w.item() == pytest.approx(9.5)


def test_infinite_losses_stop_the_training() -> None:
    model = Slope()
    model.w.data.fill_(math.inf)
    trainer = _trainer(model)
    with pytest.raises(FloatingPointError):
        trainer.train(0, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 training needs a CUDA device")
def test_mixed_precision_scales_the_losses() -> None:
    dtypes = []

    class Mixed(Slope):
        def forward(self, x: torch.Tensor) -> Any:
            dtypes.append((x[None] @ x[:, None]).dtype)
            return super().forward(x)

    trainer = _trainer(Mixed().cuda(), AMPTrainer)
    trainer.train(0, 2)
    assert dtypes == [torch.float16, torch.float16]
    assert trainer.model.w.item() == pytest.approx(7.0)
    scale = trainer.state_dict()["grad_scaler"]["scale"]
    assert scale > 1
    other = _trainer(Slope().cuda(), AMPTrainer)
    other.load_state_dict(
        {
            **trainer.state_dict(),
            "grad_scaler": {**trainer.state_dict()["grad_scaler"], "scale": scale / 4},
        }
    )
    assert other.grad_scaler.get_scale() == scale / 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a CUDA device")
def test_mixed_precision_needs_cuda() -> None:
    with pytest.raises(AssertionError, match="CUDA"), pytest.warns(UserWarning, match="CUDA"):
        _trainer(kind=AMPTrainer).train(0, 1)


def test_training_needs_training_mode() -> None:
    trainer = _trainer()
    trainer.model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        trainer.train(0, 1)


def _scheduled(folder: Path, model: nn.Module) -> tuple[Any, DetectionCheckpointer]:
    trainer = _trainer(model)
    checkpointer = DetectionCheckpointer(model, str(folder), trainer=trainer)
    scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 3)
    trainer.register_hooks(
        [
            hooks.LRScheduler(scheduler=scheduler),
            hooks.PeriodicCheckpointer(checkpointer, 2),
        ]
    )
    return trainer, checkpointer


def test_an_interrupted_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, _ = _scheduled(tmp_path / "whole", Slope())
    (tmp_path / "whole").mkdir()
    whole.train(0, 7)

    (tmp_path / "parts").mkdir()
    first, _ = _scheduled(tmp_path / "parts", Slope())
    first.train(0, 4)
    second, checkpointer = _scheduled(tmp_path / "parts", Slope())
    assert second.state_dict()["iteration"] == 0
    rest = checkpointer.resume_or_load("", resume=True)
    assert (second.iter, rest["iteration"]) == (3, 3)
    second.train(second.iter + 1, 7)
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict())
    assert second.state_dict()["hooks"] == whole.state_dict()["hooks"]
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.1**2)
    saved = torch.load(tmp_path / "parts" / "model_final.pth")
    assert set(saved) == {"model", "trainer", "iteration"}
    assert set(saved["trainer"]) == {"iteration", "hooks", "optimizer"}


def test_states_of_unknown_hooks_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("detectron2").propagate = True
    trainer = _trainer()
    trainer.load_state_dict({**trainer.state_dict(), "iteration": 4, "hooks": {"Gone": {}}})
    assert trainer.iter == 4
    assert "Gone" in caplog.text


def test_rates_are_stored_before_they_change() -> None:
    trainer = _trainer()
    schedule = MultiStepParamScheduler([1, 0.1], milestones=[2], num_updates=4)
    trainer.register_hooks([hooks.LRScheduler(scheduler=schedule)])
    trainer.train(0, 4)
    rates = [rate for rate, _ in trainer.storage.history("lr").values()]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05])


@pytest.mark.parametrize(
    ("sizes", "rates", "reported"),
    [([1, 2], [3.0, 1.0], 1.0), ([1, 1, 1], [3.0, 1.0, 1.0], 1.0), ([2, 1], [3.0, 1.0], 3.0)],
)
def test_the_rate_of_the_largest_or_commonest_group_is_stored(
    sizes: list[int], rates: list[float], reported: float
) -> None:
    trainer = _trainer()
    groups = [
        {"params": [nn.Parameter(torch.zeros(1)) for _ in range(size)], "lr": rate}
        for size, rate in zip(sizes, rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer.register_hooks([hooks.LRScheduler(optimizer, scheduler)])
    trainer.train(0, 1)
    assert trainer.storage.latest()["lr"] == (reported, 0)


def test_evaluation_is_periodic_and_final(tmp_path: Path) -> None:
    for max_iter, expected in ((6, [2, 6]), (7, [2, 5, 7])):
        iterations: list[int] = []
        trainer = _trainer()

        def evaluate(trainer: Any = trainer, found: Any = iterations) -> dict[str, Any]:
            found.append(trainer.iter)
            return {"bbox": {"AP": 3.0 * trainer.iter}, "speed": 1}

        writer = JSONWriter(str(tmp_path / f"{max_iter}.json"))
        writers = hooks.PeriodicWriter([writer], period=4)
        trainer.register_hooks([hooks.EvalHook(3, evaluate), writers])
        trainer.train(0, max_iter)
        assert iterations == expected
        text = (tmp_path / f"{max_iter}.json").read_text()
        last = json.loads(text.splitlines()[-1])
        assert (last["iteration"], last["bbox/AP"]) == (max_iter, 3.0 * max_iter)


def test_no_evaluation_after_a_failure() -> None:
    trainer = _failing_trainer()
    trainer.register_hooks([hooks.EvalHook(0, lambda: pytest.fail("evaluated"))])
    with pytest.raises(RuntimeError, match="broken step"):
        trainer.train(0, 5)


def test_results_are_numbers() -> None:
    trainer = _trainer()
    trainer.register_hooks([hooks.EvalHook(0, lambda: {"bbox": {"AP": "high"}})])
    with pytest.raises(ValueError, match="high|bbox/AP"):
        trainer.train(0, 1)


def test_step_times(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("detectron2").propagate = True
    trainer = _trainer()
    trainer.register_hooks([hooks.IterationTimer(warmup_iter=3)])
    with caplog.at_level(logging.INFO, logger="detectron2"):
        trainer.train(0, 6)
    iterations = [iteration for _, iteration in trainer.storage.history("time").values()]
    assert iterations == [2, 3, 4, 5]
    assert "Overall training speed: 4 iterations in 0:00:00" in caplog.text
    assert "Total training time: 0:00:00 (0:00:00 on hooks)" in caplog.text


def test_default_writers(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "output"
    trainer = _trainer()
    trainer.register_hooks([hooks.PeriodicWriter(default_writers(str(folder), 3), period=2)])
    trainer.train(0, 3)
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    # Medians of the losses 30, 25.5 and 21.
    assert [line["total_loss"] for line in lines] == pytest.approx([27.75, 25.5])
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1


def test_options_of_scripts() -> None:
    parse = default_argument_parser("Some words.").parse_args
    defaults = vars(parse([]))
    address = defaults.pop("dist_url")
    assert address.startswith("tcp://127.0.0.1:")
    assert 2**15 + 2**14 <= int(address.rsplit(":")[-1]) < 2**16
    assert defaults == {
        "config_file": "",
        "resume": False,
        "eval_only": False,
        "num_gpus": 1,
        "num_machines": 1,
        "machine_rank": 0,
        "opts": [],
    }
    arguments = parse(["--config-file", "a.py", "--resume", "--num-gpus", "2", "a.b=1", "c=[2]"])
    assert (arguments.config_file, arguments.resume, arguments.num_gpus) == ("a.py", True, 2)
    assert arguments.opts == ["a.b=1", "c=[2]"]


@pytest.fixture
def _loggers_left_as_found() -> Any:
    before = {name: logging.getLogger(name).handlers[:] for name in ("detectron2", "fvcore")}
    yield
    for name, handlers in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).propagate = True


@pytest.mark.usefixtures("_loggers_left_as_found")
def test_default_setup(tmp_path: Path) -> None:
    config_file = tmp_path / "config.py"
    config_file.write_text("# what was asked for\n")
    cfg = OmegaConf.create({"train": {"output_dir": str(tmp_path / "out"), "seed": 5}})
    numbers = []
    for _ in range(2):
        arguments = argparse.Namespace(config_file=str(config_file), eval_only=False)
        default_setup(cfg, arguments)
        numbers.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert numbers[0] == numbers[1]
    assert os.environ["PYTHONHASHSEED"] == "5"
    saved = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert saved == cfg
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Rank of current process: 0. World size: 1" in log
    assert "config_file=" in log
    assert torch.__version__ in log
    assert f"Full config saved to {tmp_path / 'out' / 'config.yaml'}" in log


def test_one_process_needs_no_wrapper() -> None:
    model = Slope()
    assert create_ddp_model(model, broadcast_buffers=False) is model


def test_losses_can_use_the_storage_of_the_training() -> None:
    class Counting(Slope):
        def forward(self, x: torch.Tensor) -> Any:
            get_event_storage().put_scalar("inputs", x.numel())
            return super().forward(x)

    trainer = _trainer(Counting())
    trainer.train(0, 1)
    assert trainer.storage.latest()["inputs"] == (2.0, 0)


@pytest.mark.parametrize("before_forward", [False, True])
def test_gradients_do_not_add_up(before_forward: bool) -> None:
    trainer = _trainer(zero_grad_before_forward=before_forward)
    trainer.train(0, 3)
    assert trainer.model.w.grad.item() == pytest.approx(3.0)


def test_data_loaders_can_be_replaced() -> None:
    trainer = _trainer()
    trainer.train(0, 1)
    trainer.reset_data_loader(lambda: [torch.full((2,), 2.0)])
    with EventStorage() as trainer.storage:
        trainer.run_step()
    # 10 - 0.5 * 3, then 2 * 3 as gradient.
    assert trainer.model.w.item() == pytest.approx(8.5 - 3.0)


@pytest.mark.parametrize(
    ("mode", "values", "saved", "best"),
    [
        ("max", [0.3, 0.4, 0.35, 0.5], [1, 3, 8], 0.5),
        ("min", [1.0, 0.8, 0.9, 0.9], [1, 3], 0.8),
        ("max", [math.nan, 0.3, 0.3, 0.2], [3], 0.3),
    ],
)
def test_best_checkpoints(
    tmp_path: Path, mode: str, values: list[float], saved: list[int], best: float
) -> None:
    iterations = []

    class Checkpointer(DetectionCheckpointer):
        def save(self, name: str, **kwargs: Any) -> None:
            assert name == "model_best"
            iterations.append(kwargs["iteration"])

    trainer = _trainer()
    results = iter(values)
    hook = hooks.BestCheckpointer(2, Checkpointer(trainer.model, str(tmp_path)), "AP", mode)
    trainer.register_hooks([hooks.EvalHook(2, lambda: {"AP": next(results)}), hook])
    trainer.train(0, 8)
    assert iterations == saved
    assert hook.best_metric == best


def test_callbacks_get_the_trainer() -> None:
    seen: list[tuple[str, int]] = []
    trainer = _trainer()
    hook = hooks.CallbackHook(
        before_train=lambda t: seen.append(("before", t.iter)),
        after_step=lambda t: seen.append(("step", t.iter)),
        after_train=lambda t: seen.append(("after", t.iter)),
    )
    trainer.register_hooks([hook])
    trainer.train(0, 2)
    assert seen == [("before", 0), ("step", 0), ("step", 1), ("after", 2)]


def test_metrics_are_gathered_periodically() -> None:
    trainer = _trainer(gather_metric_period=2)
    trainer.train(0, 4)
    iterations = [iteration for _, iteration in trainer.storage.history("total_loss").values()]
    assert iterations == [1, 3]


def test_own_loops() -> None:
    class Counting(TrainerBase):
        steps = 0

        def run_step(self) -> None:
            self.steps += self.iter

    trainer = Counting()
    trainer.register_hooks([hooks.CallbackHook(after_step=lambda t: t.storage.put_scalar("x", 1))])
    trainer.train(2, 5)
    assert trainer.steps == 2 + 3 + 4
    assert trainer.storage.latest() == {"x": (1.0, 4)}
    assert trainer.state_dict() == {"iteration": 5}
