"""Learning-rate schedules, in epochs of COCO: 7,500 iterations of 16 images.

A model's config sets the length beside it: `train.max_iter = 12 * ITERATIONS_PER_EPOCH`.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

# COCO train2017 has 117,266 images with boxes: 7,329 batches of 16. The DETRs round it up.
ITERATIONS_PER_EPOCH = 7500


def step_schedule(*, epochs: int, decay_epochs: list[int]):
    """Config of a schedule that divides the learning rate by 10 at the end of given epochs.

    Args:
        epochs: length of the training.
        decay_epochs: increasing epochs, each less than `epochs`.

    Returns:
        Config of an fvcore scheduler.
    """
    return L(MultiStepParamScheduler)(
        values=[10.0**-step for step in range(len(decay_epochs) + 1)],
        milestones=[epoch * ITERATIONS_PER_EPOCH for epoch in [*decay_epochs, epochs]],
    )


def warmup_schedule(*, epochs: int, decay_iterations: list[int], warmup_iterations: int):
    """Config of a step schedule whose learning rate first rises linearly from a thousandth.

    Args:
        epochs: length of the training.
        decay_iterations: increasing iterations at which the learning rate is divided by 10.
        warmup_iterations: length of the rise.

    Returns:
        Config of a Detectron2 scheduler.
    """
    max_iter = epochs * ITERATIONS_PER_EPOCH
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[10.0**-step for step in range(len(decay_iterations) + 1)],
            milestones=[*decay_iterations, max_iter],
        ),
        warmup_factor=0.001,
        warmup_length=warmup_iterations / max_iter,
        warmup_method="linear",
    )


lr_multiplier_12ep = step_schedule(epochs=12, decay_epochs=[11])
lr_multiplier_24ep = step_schedule(epochs=24, decay_epochs=[20])
lr_multiplier_36ep = step_schedule(epochs=36, decay_epochs=[30])
lr_multiplier_50ep = step_schedule(epochs=50, decay_epochs=[40])
lr_multiplier_300ep = step_schedule(epochs=300, decay_epochs=[200])
lr_multiplier_500ep = step_schedule(epochs=500, decay_epochs=[400])

# Detectron2's "3x": 270,000 iterations, decays 60,000 and 20,000 iterations before the end.
lr_multiplier_3x = warmup_schedule(
    epochs=36, decay_iterations=[210_000, 250_000], warmup_iterations=1000
)

# Detectors with DAT: 500 iterations of warm-up, decays after 8 and 11 of 12 epochs.
lr_multiplier_12ep_warmup = warmup_schedule(
    epochs=12,
    decay_iterations=[8 * ITERATIONS_PER_EPOCH, 11 * ITERATIONS_PER_EPOCH],
    warmup_iterations=500,
)
