"""What is measured of a whole model: a pass of inference, a step of training, and their stages."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from kernel_benchmark.memory import peak_memory
from kernel_benchmark.stages import Duration, StageTimer, StopWatch, outer_stages
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

from efficient_detr.engine.trainer import Trainer
from efficient_detr.errors import UserError
from efficient_detr.evaluation.flops import stage_modules

INFERENCE, TRAINING = "inference", "training"
"""The kinds of work."""

LOSSES, BACKWARD, OPTIMIZER = "losses", "backward", "optimizer"
"""Stages of a training step beside those of the model."""

BOXES_PER_IMAGE = 7  # about as many as in COCO
COMPILER = "inductor"

Batch = list[dict[str, Any]]
Sample = dict[str, Duration]  # of one pass, by stage
Result = TypeVar("Result")


def draw_batch(size: tuple[int, int], batch_size: int, num_classes: int) -> Batch:
    """Random images and boxes, the same in each call.

    Args:
        size: (height, width) in pixels.
        batch_size: number of images.
        num_classes: K; labels are in [0, K).

    Returns:
        Detectron2's input dicts with uint8 "image" (3, H, W) and "instances".
    """
    generator = torch.Generator().manual_seed(0)
    height, width = size
    scale = torch.tensor([width, height, width, height])
    batch = []
    for index in range(batch_size):
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)
        corners = torch.rand(BOXES_PER_IMAGE, 2, generator=generator) * 0.7
        sides = torch.rand(BOXES_PER_IMAGE, 2, generator=generator) * 0.25 + 0.05
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], 1) * scale)
        instances.gt_classes = torch.randint(num_classes, (BOXES_PER_IMAGE,), generator=generator)
        batch.append({"image": image, "instances": instances, "image_id": index})
    return batch


class InferencePass:
    """Detects in a batch.

    Args:
        model: takes Detectron2's batched inputs.
        batch: these.
        precision: type for autocast, or None.
    """

    persistent_bytes = 0

    def __init__(self, model: nn.Module, batch: Batch, precision: torch.dtype | None) -> None:
        self._model, self._batch, self._precision = model, batch, precision

    def __call__(self) -> None:
        """Do it once."""
        self._model.eval()
        device_type = self._batch[0]["image"].device.type
        # Clustered attention draws random numbers.
        torch.manual_seed(0)
        enabled = self._precision is not None
        with torch.no_grad(), torch.autocast(device_type, self._precision, enabled=enabled):
            self._model(self._batch)


class TrainingStep(Trainer):
    """Trains on one batch again and again, without changing the weights.

    Args:
        model: returns losses in training.
        batch: Detectron2's batched inputs with instances.
        precision: type for autocast, or None.
        config: has the optimizer, and perhaps `train.clip_max_norm`.
        timer: of the model; it is told the phases.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        precision: torch.dtype | None,
        config: DictConfig,
        timer: StageTimer,
    ) -> None:
        config = config.copy()
        with open_dict(config):
            config.optimizer.params.model = model
        optimizer = instantiate(config.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        clip_max_norm = OmegaConf.select(config, "train.clip_max_norm", default=0.1) or 0.0
        super().__init__(
            model,
            itertools.repeat(batch),
            optimizer,
            clip_max_norm=clip_max_norm,
            amp_dtype=precision,
        )
        self._timer = timer
        model.register_forward_hook(self._on_losses)

    @property
    def persistent_bytes(self) -> int:
        """What the optimizer keeps from step to step."""
        states = self.optimizer.state.values()
        kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(value.numel() * value.element_size() for value in kept)

    def __call__(self) -> None:
        """Do one step, and drop the gradients: other models need the memory meanwhile."""
        self.model.train()
        try:
            with EventStorage(0):
                self.run_step()
        finally:
            self.optimizer.zero_grad()

    def after_backward(self) -> None:
        """The gradients are there: what follows is the optimizer's part."""
        super().after_backward()
        self._timer.begin_phase(OPTIMIZER)

    def _on_losses(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if model.training:
            self._timer.begin_phase(BACKWARD)


def make_timer(model: nn.Module, compiled: bool, watch: StopWatch) -> StageTimer:
    """The timer of a model's stages; these are compiled if wished."""
    stages = stage_modules(model)
    if compiled:
        stages = outer_stages(stages)
        for stage in stages.values():
            # Not the module as a whole, because that would compile the timer's hooks as well.
            stage.forward = torch.compile(stage.forward, backend=COMPILER, dynamic=False)
    losses = getattr(model, "losses", None)
    if isinstance(losses, nn.Module):
        stages = {**stages, LOSSES: losses}
    return StageTimer(stages, watch)


@dataclass
class Contender:
    """One kind of work of one config.

    Attributes:
        file: of the config.
        kind: "inference" or "training".
        setting: image size, precision and device, for sentences about failures.
        work: does it once.
        timer: of the model.
        stages: those that run, in the order of the model; known after the warm-up.
        samples: what has been measured, by stage, of each round.
        peak_bytes: None if unknown.
        problem: why there are no results; "" if there are.
    """

    file: str
    kind: str
    setting: str
    work: InferencePass | TrainingStep
    timer: StageTimer
    stages: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    peak_bytes: int | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """The config's."""
        return Path(self.file).stem

    def warm_up(self) -> None:
        """Do the work once without keeping its times, because something may be loaded first.

        Raises:
            UserError: if the model cannot do it. A lack of memory is only noted as the problem, now
                and later, and nothing is done any more.
        """
        self.stages = self.timer.in_order(self._attempt(self._measure) or {})

    def take_turn(self) -> None:
        """Do the work once; see `warm_up` for errors."""
        sample = self._attempt(self._measure)
        if sample is not None:
            self.samples.append(sample)

    def measure_peak(self, device: torch.device) -> None:
        """Measure the peak memory of the work, which has been done before; errors as above."""
        increase = self._attempt(lambda: peak_memory(self.work, device))
        if increase is not None:
            self.peak_bytes = increase + self.work.persistent_bytes

    def _measure(self) -> Sample:
        return self.timer.measure(self.work)

    def _attempt(self, call: Callable[[], Result]) -> Result | None:
        """Call something; None where memory is lacking."""
        if self.problem:
            return None
        try:
            return call()
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from error
        # Torch's errors about shapes and types.
        except (RuntimeError, ValueError) as error:
            if not is_out_of_memory(error):
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(
                    f"{self.file}: {self.kind} with {self.setting} is not possible: {reason}"
                ) from error
        # Only now is the exception gone, which holds tensors.
        release_memory()
        self.problem = f"{self.name} ran out of memory in {self.kind}, with {self.setting}."
        return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error tells that a device has no memory left; CPUs have no type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give back what a pass that broke off has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
