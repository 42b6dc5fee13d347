"""Random numbers as a function of what they are used for, not of what was drawn before them.

Training draws random numbers in three places: the order of the samples, the augmentation of a
sample and the step itself (denoising noise, dropout). Each use seeds the global generators from
``(seed, purpose, position)``. So a run that resumes at iteration N draws what an uninterrupted run
draws there, and the number of data-loading workers changes nothing.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Purposes keep the streams apart: sample 7 and iteration 7 must not share their random numbers.
AUGMENTATION_STREAM = 1
ITERATION_STREAM = 2


def derive_seed(*keys: int) -> int:
    """Mix non-negative integers into one well spread seed.

    Args:
        keys: any number of integers >= 0, e.g. ``(seed, purpose, position)``.

    Returns:
        An integer in ``[0, 2**32)``. Equal keys give equal seeds on every platform.

    Raises:
        ValueError: if a key is negative.
    """
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (CPU and, if there, GPU)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Run the body under a seed of its own and give the global CPU generators back as they were.

    Detectron2's augmentations draw from NumPy's global generator, so a sample can only have its own
    random numbers if the global generator is seeded around it.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
