"""The benchmark of modulated attention: its formulations do equal work."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
CPU = torch.device("cpu")

with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(TOOLS))
    bench: Any = importlib.import_module("bench_modulation")


@pytest.mark.parametrize("training", [False, True])
def test_formulations_agree(training: bool) -> None:
    inputs = bench.draw_inputs(bench.Level("", (6, 9), 0.5), CPU, 7)
    exact = inputs.converted(torch.float64, gradients=training)
    expected = bench.run_once(bench.published_form, exact)
    assert len(expected) == (6 if training else 1)
    for formulation in bench.FORMULATIONS.values():
        for result, truth in zip(bench.run_once(formulation, exact), expected, strict=True):
            torch.testing.assert_close(result, truth, atol=1e-10, rtol=1e-9)


def test_the_separable_form_takes_little_memory() -> None:
    inputs = bench.draw_inputs(bench.Level("", (25, 42), 1.0), CPU, 300)
    published, separable, folded = (
        bench.peak_bytes(formulation, inputs) for formulation in bench.FORMULATIONS.values()
    )
    bias = 4 * 8 * 300 * 25 * 42
    # Two tensors of the last dimension 2: differences and their squares.
    assert published > 4 * bias
    assert bias <= separable < 1.5 * bias
    assert folded < separable


def test_peak_memory_counts_what_is_alive() -> None:
    with bench.PeakMemory() as memory:
        first = torch.zeros(1000)  # 4000 bytes
        del first
        second = torch.zeros(1500)  # 6000 bytes
        view = second[:10]
        third = view + 1  # 40 bytes
    assert memory.peak == 6040
    assert third.shape == (10,)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--small", "--rounds", "1", "--markdown"]) == 0
    table = capsys.readouterr().out
    for name in bench.FORMULATIONS:
        assert table.count(name) == 2  # inference and training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, not 0."),
        (["--threads", "0"], "--threads must be at least 1, not 0."),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err
