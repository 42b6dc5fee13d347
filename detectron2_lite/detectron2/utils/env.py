"""Random seeds, and the version of PyTorch."""

import logging
import os
import random

import numpy as np
import torch

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def seed_all_rng(seed: int | None = None) -> None:
    """Seeds Python's, numpy's and torch's generators; None draws a seed and logs it."""
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "big")
        logging.getLogger(__name__).info("Using a generated random seed %d", seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # seeds the CUDA generators too
    os.environ["PYTHONHASHSEED"] = str(seed)
