"""The benchmark of clustered attention: what it compares, and what it prints."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"

with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(TOOLS))
    bench = importlib.import_module("bench_clustered_attention")


@pytest.mark.parametrize("training", [False, True])
def test_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], training: bool) -> None:
    path = tmp_path / "new" / "numbers.json"
    command = ["--tokens", "24", "40", "--ratios", "0.25", "1", "--turns", "3", "--json", str(path)]
    assert bench.main([*command, *(["--training"] if training else [])]) == 0
    header, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        *("tokens", "dense, ms", "C/N 0.25", "C/N 1")
    ]
    assert [line.split("|")[1].strip() for line in lines] == ["24", "40"]
    found = json.loads(path.read_text())
    assert found["training"] is training
    row = found["rows"][1]
    assert [entry["clusters"] for entry in row["clustered"]] == [10, 40]
    for entry in row["clustered"]:
        assert entry["speedup"] == pytest.approx(row["dense_seconds"] / entry["seconds"])


def test_both_sides_do_the_same_work() -> None:
    """With copies of few queries, clustered attention is exact; and dense is dense."""
    attention = bench.build(32)
    heads = bench.draw_heads(40, 10, torch.device("cpu"))
    given = []
    attention.query_clustering.register_forward_hook(lambda m, a, output: given.append(output))
    clustered = bench.attend(attention, heads)
    dense = bench.run_dense(bench.attend, attention, heads)
    assert len(given) == 1 and given[0].counts.shape[2] == 10
    torch.testing.assert_close(clustered, dense, atol=1e-4, rtol=1e-4)
    assert not clustered.requires_grad
    assert len(bench.attend_and_learn(attention, heads)) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--ratios", "1.5"], "--ratios must lie in"),
        (["--tokens", "0"], "must be at least 1"),
        (["--turns", "0"], "must be at least 1"),
    ],
)
def test_errors(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    assert text in capsys.readouterr().err
