"""Set-up of all tests: one thread, fixed seeds, no windows; `--golden` and the marker `gpu`."""

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before anything imports Matplotlib or starts OpenMP's threads.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--golden=DIR`; tests get all folders with `config.getoption("golden")`."""
    parser.addoption(
        "--golden",
        action="append",
        type=Path,
        metavar="DIR",
        help="folder of golden reference numbers; may be repeated (default: tests/golden)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes sums independent of the number of cores, and fills in the folder of our own numbers."""
    torch.set_num_threads(1)
    config.option.golden = config.option.golden or [GOLDEN]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Gives each test the same random numbers, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    if torch.get_default_dtype() is not torch.float32:
        torch.set_default_dtype(torch.float32)
        pytest.fail("the test changed torch's default dtype and did not restore it")


@pytest.fixture(autouse=True)
def _open_streams() -> Iterator[None]:
    """Takes loggers off the captured streams of a test that is over.

    Detectron2's `setup_logger` keeps its handlers for the life of the process, and a message to a
    closed stream prints a traceback into the output of a later test.
    """
    yield
    for name in (None, *logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            stream = getattr(handler, "stream", None)
            if stream is not None and getattr(stream, "closed", False):
                logger.removeHandler(handler)
