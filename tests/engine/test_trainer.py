"""The training step: precision, clipping, and what happens when a loss is not a number."""

from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from efficient_detr.engine.trainer import Trainer
from efficient_detr.errors import NonFiniteLossError

BATCH = [{"image_id": 7, "file_name": "seven.jpg"}, {"image_id": 9, "file_name": "nine.jpg"}]


class Scaled(nn.Module):
    """One loss, the sum of a weight times a factor; gradient = factor for each of its entries."""

    def __init__(self, factor: float, *, other: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.factor = factor
        self.other = other
        self.seen_dtype: torch.dtype | None = None

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.seen_dtype = (self.weight[None] @ self.weight[:, None]).dtype
        loss = (self.weight * self.factor).sum()
        return {"loss_good": loss, "loss_other": loss.detach() * 0 + self.other}


class Batches:
    """Endless batches with a state, like the project's loader."""

    def __init__(self) -> None:
        self.seed = 5

    def __iter__(self) -> Any:
        while True:
            yield BATCH

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed = state["seed"]


def build(model: nn.Module, **options: Any) -> Trainer:
    return Trainer(model, Batches(), torch.optim.SGD(model.parameters(), lr=1.0), **options)


def step(trainer: Trainer) -> EventStorage:
    trainer.iter = 11
    with EventStorage(11) as storage:
        trainer.run_step()
    return storage


def test_gradient_is_clipped_to_the_norm() -> None:
    # Gradient (3, 3, 3, 3): norm 6. Clipped to 0.1, each entry is 0.1 / 2 = 0.05, and SGD with
    # learning rate 1 subtracts it.
    model = Scaled(3.0)
    storage = step(build(model, clip_max_norm=0.1))
    torch.testing.assert_close(model.weight.detach(), torch.full((4,), -0.05))
    assert storage.latest()["grad_norm"][0] == pytest.approx(6.0)


def test_a_small_gradient_stays_as_it_is() -> None:
    model = Scaled(0.01)
    step(build(model, clip_max_norm=0.1))
    torch.testing.assert_close(model.weight.detach(), torch.full((4,), -0.01))


def test_zero_switches_clipping_off() -> None:
    model = Scaled(3.0)
    step(build(model, clip_max_norm=0.0))
    torch.testing.assert_close(model.weight.detach(), torch.full((4,), -3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_on_the_cpu(dtype: torch.dtype) -> None:
    model = Scaled(3.0)
    trainer = build(model, amp_dtype=dtype, clip_max_norm=0.1)
    step(trainer)
    assert model.seen_dtype == dtype
    assert trainer.grad_scaler.is_enabled() == (dtype == torch.float16)
    # Clipping comes after the scale of the loss has been divided out.
    torch.testing.assert_close(model.weight.detach(), torch.full((4,), -0.05))


def test_full_precision_is_the_default() -> None:
    model = Scaled(3.0)
    step(build(model))
    assert model.seen_dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_names_itself_the_iteration_and_the_images(value: float) -> None:
    model = Scaled(3.0, other=value)
    with pytest.raises(NonFiniteLossError) as caught:
        step(build(model))
    text = str(caught.value)
    for part in ("'loss_other'", "iteration 11", "7 (seven.jpg)", "9 (nine.jpg)"):
        assert part in text
    assert "loss_good" not in text
    assert model.weight.abs().sum() == 0, "the weights must be left as they were"


def test_a_bad_gradient_of_a_good_loss_is_found_before_the_step() -> None:
    class Root(Scaled):
        """The square root has an infinite slope at 0."""

        def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {"loss_root": self.weight.sqrt().sum()}

    model = Root(1.0)
    with pytest.raises(NonFiniteLossError, match="gradient norm is inf at iteration 11"):
        step(build(model))
    assert model.weight.abs().sum() == 0


def test_state_holds_scaler_seed_and_loader() -> None:
    first = build(Scaled(1.0), amp_dtype=torch.float16, seed=21)
    step(first)
    first.grad_scaler.update(128.0)
    loader = Batches()
    loader.seed = 77
    first.data_loader = loader
    second = build(Scaled(1.0), amp_dtype=torch.float16, seed=1)
    second.load_state_dict(first.state_dict())
    assert second.grad_scaler.get_scale() == 128.0
    assert isinstance(second.data_loader, Batches)
    assert (second.seed, second.data_loader.seed, second.iter) == (21, 77, 11)


def test_random_numbers_of_a_step_depend_on_the_iteration_only() -> None:
    class Noisy(Scaled):
        """Remembers what it drew."""

        def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
            self.drawn = torch.rand(3)
            return super().forward(batch)

    def draw(iteration: int, seed: int, wasted: int) -> Tensor:
        trainer = build(model := Noisy(1.0), seed=seed)
        torch.rand(wasted)
        trainer.iter = iteration
        with EventStorage(iteration):
            trainer.run_step()
        return model.drawn

    torch.testing.assert_close(draw(6, 4, 1), draw(6, 4, 5), rtol=0, atol=0)
    assert not torch.equal(draw(6, 4, 1), draw(7, 4, 1))
    assert not torch.equal(draw(6, 4, 1), draw(6, 5, 1))
