"""The benchmark of the kernels: that it compares equal work, and what it makes of the times."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from efficient_detr.ops import (
    deformable_sampling_locations,
    fused_multi_scale_deformable_attention,
    library,
)
from efficient_detr.ops.deformable_attention_pytorch import sample_by_grid_sample
from efficient_detr.ops.lsh_clustering import draw_projections

TOOLS = Path(__file__).parents[2] / "tools"
CPU = torch.device("cpu")
IS_COMPILED = not library.missing_reason(CPU)

with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(TOOLS))
    bench_kernels = importlib.import_module("bench_kernels")
    attention, case, clustering, dat, formulations, report, timing, workloads = (
        importlib.import_module(f"kernel_benchmark.{name}")
        for name in (
            *("attention", "case", "clustering", "dat"),
            *("formulations", "report", "timing", "workload"),
        )
    )

PROMISED = [
    "encoder_forward",
    "encoder_training",
    "encoder_random_forward",
    "decoder_forward",
    "decoder_training",
    "lsh_total",
    "fallback_encoder_forward",
]
OTHERS = ["encoder_fused_training", "decoder_forward_fp16", "lsh_group", "dat_sampling"]
SHAPES = [(5, 7), (3, 4), (1, 2)]


# The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """One run at tiny sizes: status, printed text, folder of the written files."""
    folder = tmp_path_factory.mktemp("bench")
    capture = pytest.MonkeyPatch()
    printed: list[str] = []
    capture.setattr("builtins.print", lambda *texts: printed.append(" ".join(texts)))
    try:
        status = bench_kernels.main(
            ["--small", "--rounds", "1", "--cases", *PROMISED, *OTHERS]
            + ["--json", str(folder / "new" / "found.json"), "--plot", str(folder / "found.png")]
        )
    finally:
        capture.undo()
    return {"status": status, "printed": "\n".join(printed), "folder": folder}


def test_all_promised_rows_are_measured_and_right(run) -> None:
    assert run["status"] == 0
    found = json.loads((run["folder"] / "new" / "found.json").read_text())
    for name in PROMISED + OTHERS:
        row = found["cases"][name]
        needs_kernels = row["ours"] == "compiled"
        assert row["reference_ms"] > 0
        if needs_kernels and not IS_COMPILED:
            assert row["ratio"] is None and "kernels" in row["problem"]
        else:
            assert row["ratio"] == pytest.approx(row["reference_ms"] / row["ours_ms"])
            assert 0 <= row["max_error"] < (1e-3 if "fp16" in name else 1e-5)
    assert found["cases"]["encoder_forward"]["required"] == 20


def test_the_machine_is_described(run) -> None:
    found = json.loads((run["folder"] / "new" / "found.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["device"] == "cpu"
    assert found["machine"]["cpu"] and found["machine"]["capability"]
    assert found["copy_gigabytes_per_second"] > 0


def test_files_are_whole_and_alone(run) -> None:
    files = sorted(str(p.relative_to(run["folder"])) for p in run["folder"].rglob("*.*"))
    assert files == ["found.png", "new/found.json"]
    assert (run["folder"] / "found.png").read_bytes().startswith(b"\x89PNG")


def test_tables_name_rows_and_those_who_could_not_take_part(run) -> None:
    for name in PROMISED + OTHERS:
        assert f"\n{name} " in run["printed"]
    assert "kernels hub" in run["printed"] and "it has no kernel for the CPU" in run["printed"]


def test_markdown_prints_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--small", "--rounds", "1", "--markdown", "--cases", "lsh_group"]
    assert bench_kernels.main(arguments) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert len(lines) == 3 and lines[2].startswith("| `lsh_group` ")
    assert "LSH clustering, group" in printed.err  # the progress


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--cases", "lsh_totl"], "lsh_totl; it can be encoder_forward"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--threads", "-1"], "--threads must be at least 1, not -1"),
    ],
)
def test_bad_arguments_are_a_sentence(
    arguments: list[str], culprit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_kernels.main(["--small", *arguments]) == 2
    assert culprit in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--json", ".", "it is a folder"),
        ("--json", "file/found.json", "cannot be written"),
        ("--plot", "found.foo", "must end in .png"),
    ],
)
def test_result_files_that_cannot_be_written_are_refused_first(
    option: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert bench_kernels.main(["--small", option, str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interruption_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_kernels, "benchmark", interrupt)
    assert bench_kernels.main([]) == 130
    assert "Interrupted" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main(["--device", "cuda", "--small"]) == 2
    assert "there is none here" in capsys.readouterr().err


def fake_plan(**results: object) -> object:
    """A case whose exact result is 1, with contenders that return numbers or raise errors."""

    def contender(name: str, result: object) -> object:
        def run() -> list[Tensor]:
            if isinstance(result, Exception):
                raise result
            return [torch.tensor([result])]

        return case.Contender(run, run, ours=name.startswith("ours"))

    contenders = {name: contender(name, result) for name, result in results.items()}
    exact = partial(list, [torch.ones(1, dtype=torch.float64)])
    built = case.Case(contenders, exact, 1e-5, 4, missing={})
    comparison = case.Comparison("fake", "ours", ("theirs",))
    return case.Plan("a case", (comparison,), lambda: built)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Replaces all cases by one."""

    def put(plan: object) -> None:
        for name in ("plan_attention", "plan_clustering", "plan_dat"):
            plans = [plan] if name == "plan_dat" else []
            monkeypatch.setattr(bench_kernels, name, lambda *args, plans=plans, **kwargs: plans)

    return put


@pytest.mark.parametrize("result", [1.001, float("nan"), float("inf")])
def test_a_wrong_result_of_ours_fails(only, result: float, capsys) -> None:
    only(fake_plan(ours=result, theirs=1.0))
    assert bench_kernels.main(["--small", "--rounds", "1"]) == 1
    assert "Wrong: a case: ours differs from float64" in capsys.readouterr().err


def test_a_wrong_result_of_others_is_a_remark(only, capsys) -> None:
    only(fake_plan(ours=1.0, theirs=1.001))
    assert bench_kernels.main(["--small", "--rounds", "1"]) == 0
    assert "differs from float64 by more than 1e-05" in capsys.readouterr().out


def test_others_may_fail_and_ours_may_not(only, capsys) -> None:
    only(fake_plan(ours=1.0, theirs=RuntimeError("no such luck\nsecond line")))
    assert bench_kernels.main(["--small", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "fails: no such luck" in printed and "second line" not in printed
    only(fake_plan(ours=RuntimeError("ours broke"), theirs=1.0))
    with pytest.raises(RuntimeError, match="ours broke"):
        bench_kernels.main(["--small", "--rounds", "1"])


# Times -------------------------------------------------------------------------------------------


class ScriptedClock:
    """Says what it is told and notes who was called."""

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.times = {name: iter(values) for name, values in times.items()}
        self.order: list[str] = []

    def turn(self, call, repetitions: int) -> tuple[float, float | None]:
        self.order.append(call())
        return next(self.times[call()]), None


def test_turns_alternate_and_the_fastest_counts() -> None:
    clock = ScriptedClock({"a": [1, 5, 2, 3], "b": [1, 4, 4, 6]})  # the first finds repetitions
    rounds: list[int] = []
    timings = timing.interleave(
        {"a": lambda: "a", "b": lambda: "b"}, clock, 3, on_round=lambda: rounds.append(1)
    )
    assert "".join(clock.order) == "ab" + "ab" + "ba" + "ab"
    assert timings["a"] == timing.Timing(2, None, 3 / 2 - 1, 3)
    assert timings["b"] == timing.Timing(4, None, 0, 3)
    assert len(rounds) == 3


def test_a_case_that_takes_too_long_ends_after_three_rounds(monkeypatch) -> None:
    monkeypatch.setattr(timing, "LONGEST_CASE_SECONDS", -1.0)
    clock = ScriptedClock({"a": [1] * 20})
    assert timing.interleave({"a": lambda: "a"}, clock, 10)["a"].rounds == 3


def test_fast_calls_are_repeated() -> None:
    calls: list[int] = []
    clock = timing.CPUClock()
    seconds, computing = clock.turn(lambda: calls.append(sum(range(1000))), 50)
    assert len(calls) == 50
    assert 0 < seconds < 0.1 and 0 <= computing < 0.1


def measurement(seconds: float | None, cpu_seconds: float | None = None) -> object:
    measured = None if seconds is None else timing.Timing(seconds, cpu_seconds, 0.0, 3)
    return report.Measurement(measured, 0.0)


def test_a_row_takes_the_fastest_reference() -> None:
    comparison = case.Comparison("row", "ours", ("slow", "fast", "absent", "failed"))
    found = {
        "ours": measurement(0.5, 0.4),
        "slow": measurement(4.0, 3.0),
        "fast": measurement(3.0, 2.0),
        "failed": measurement(None),
    }
    row = report.make_row(comparison, found, compulsory_bytes=1000, bandwidth=8000.0)
    assert (row.reference, row.ratio, row.cpu_ratio) == ("fast", 6.0, pytest.approx(5.0))
    assert row.bytes_per_second / row.bandwidth == 0.25  # 2000 of 8000 bytes a second


def test_a_row_without_a_contender_has_no_ratio() -> None:
    row = report.make_row(case.Comparison("row", "ours", ("a",)), {"a": measurement(1.0)}, 8, 1.0)
    assert row.ratio is None and row.bytes_per_second is None
    cells = report.summary_table([row], markdown=True).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[1:5]] == ["`row`", "-", "1000.00", "-"]


def test_infinity_is_written_as_a_word(tmp_path: Path) -> None:
    report.save_json({"a": {"error": float("inf")}}, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == {"a": {"error": "infinity"}}


def test_errors_are_relative_to_the_largest_number_of_each_tensor() -> None:
    exact = [torch.tensor([1.0, -4.0]).double(), torch.tensor([100.0]).double()]
    results = [torch.tensor([1.5, -4.0]), torch.tensor([105.0])]
    assert case.relative_error(results, exact) == 0.5 / 4
    assert case.relative_error([torch.tensor([float("nan"), 0])], exact[:1]) == float("inf")
    with pytest.raises(ValueError, match=r"\(1,\) instead of \(2,\)"):
        case.relative_error([torch.ones(1)], exact[:1])


# Deformable attention ----------------------------------------------------------------------------


def workload(queries: int | None = 6, **options: object):
    sizes = workloads.Sizes(SHAPES, 2, queries, random=bool(options.pop("random", False)))
    options = {"fused": False, "training": True, "dtype": torch.float32, **options}
    return workloads.make_workload(sizes, CPU, **options)


def test_the_reference_computes_the_operator() -> None:
    work = workload(random=True).converted(torch.float64, torch.float64)
    for result, expected in zip(
        work.result(formulations.sample_as_usual), work.result(sample_by_grid_sample), strict=True
    ):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("queries", [None, 6])
def test_the_fused_reference_computes_the_fused_operator(queries: int | None) -> None:
    work = workload(queries, fused=True).converted(torch.float64, torch.float64)
    assert work.inputs[1].shape[-1] == (2 if queries is None else 4)
    fused = partial(fused_multi_scale_deformable_attention, implementation="pytorch")
    for result, expected in zip(
        work.result(formulations.usual_arithmetic), work.result(fused), strict=True
    ):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("queries", [None, 6])
def test_fused_and_plain_inputs_are_the_same_work(queries: int | None) -> None:
    plain, fused = workload(queries, fused=False), workload(queries, fused=True)
    _, reference, offsets, logits = fused.inputs
    locations = deformable_sampling_locations(reference, offsets, SHAPES)
    torch.testing.assert_close(locations, plain.inputs[1])
    torch.testing.assert_close(logits.flatten(-2).softmax(-1), plain.inputs[2].flatten(-2))


def test_encoder_queries_sample_around_their_pixels() -> None:
    locations = workload(None).inputs[1]
    cells = torch.tensor(SHAPES[0]).flip(0)
    # The second token of the first level lies at x = 1.5, y = 0.5 of its cells.
    offsets = locations[:, 1, :, 0] * cells - torch.tensor([1.5, 0.5])
    assert offsets.abs().mean() < 5  # radius up to 4, noise of 2


def test_checked_rows_are_those_of_the_whole_work() -> None:
    """The gradient of the value is that of the checked queries alone, in both ways."""
    work = workload(None)
    work = replace(work, checked=torch.tensor([3, 40, 7]))
    results = work.result(formulations.sample_as_usual)
    assert case.relative_error(results, work.exact(formulations.sample_as_usual)) < 1e-5
    output = formulations.sample_as_usual(work.inputs[0], SHAPES, *work.inputs[1:])
    torch.testing.assert_close(results[0], output[:, [3, 40, 7]].detach())


def test_points_keep_away_from_kinks() -> None:
    locations = workload(None, random=True).inputs[1]
    pixels = locations * torch.tensor(SHAPES).flip(1)[:, None] - 0.5
    assert (pixels - pixels.round()).abs().min() > 0.0009


def test_sixteen_bits_round_the_value_only() -> None:
    half = workload(dtype=torch.float16)
    assert [tensor.dtype for tensor in half.inputs] == [torch.float16] + 2 * [torch.float32]
    as_float32 = half.converted(torch.float32, torch.float32)
    assert torch.equal(half.inputs[0].float(), as_float32.inputs[0])
    assert as_float32.upstream.dtype == torch.float32


def test_compulsory_bytes_of_an_image() -> None:
    """S = Q = 22223: value and output 256 numbers a token, points 8 * 16 * 2, weights 8 * 16."""
    sizes = workloads.Sizes(attention.IMAGE_LEVELS, 1, None)
    options = {"fused": False, "dtype": torch.float32}
    forward = 22223 * 4 * (256 + 256 + 256 + 128)
    made = workloads.make_workload(sizes, CPU, training=False, **options)
    assert made.compulsory_bytes() == forward
    # Backward reads as much, the output's gradient instead of the output, and writes 3 gradients.
    trained = replace(made, training=True)
    assert trained.compulsory_bytes() == 2 * forward + 22223 * 4 * (256 + 256 + 128)


@pytest.mark.parametrize(
    ("x", "y", "rows"),
    [
        (0.5, 0.5, 4),  # pixel coordinates (2.5, 1.5): inside
        (0.02, 0.5, 2),  # left of the first column
        (0.02, 0.02, 1),  # the corner
        (-0.5, 0.5, 0),  # outside
        (7.0, 0.5, 0),  # far outside
    ],
)
def test_touched_share(x: float, y: float, rows: int) -> None:
    locations = torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2)
    assert workloads._touched_share(locations, [(4, 6)]) == rows / 24


def test_installed_packages_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(value: Tensor, sizes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        shapes = [(height, width) for height, width in sizes.tolist()]
        return formulations.sample_as_usual(value, shapes, locations, weights)

    modules = [
        ModuleType(name) for name in ("mmcv", "mmcv.ops", "mmcv.ops.multi_scale_deform_attn")
    ]
    modules[-1].multi_scale_deformable_attn_pytorch = theirs
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sizes = workloads.Sizes(SHAPES, 1, 6)
    built = attention.build_case(CPU, sizes, fused=False, training=True, dtype=torch.float32)
    assert "mmcv" not in built.missing
    mmcv = built.contenders["mmcv"]
    assert not mmcv.ours
    assert case.relative_error(mmcv.result(), built.exact()) < 1e-5


def test_broken_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(device: torch.device) -> None:
        raise OSError("undefined symbol\nand more")

    monkeypatch.setitem(formulations.OTHER_PACKAGES, "mmcv", load)
    found, missing = formulations.find_other_packages(CPU)
    assert "mmcv" not in found
    assert missing["mmcv"] == "not usable: undefined symbol"


# Clustering and DAT ------------------------------------------------------------------------------


def literal_clustering(points: Tensor, projections: object) -> Tensor:
    """Token by token: a dictionary of cells for each row."""
    output = torch.empty_like(points)
    for image, head in torch.cartesian_prod(*(torch.arange(n) for n in points.shape[:2])).tolist():
        row = points[image, head]
        positions = (row @ projections.directions + projections.bias) / projections.width
        members: dict[tuple[float, ...], list[int]] = {}
        for token, cells in enumerate(positions.floor().tolist()):
            members.setdefault(tuple(cells), []).append(token)
        for tokens in members.values():
            output[image, head, tokens] = row[tokens].mean(0)
    return output


def test_all_formulations_of_clustering_agree() -> None:
    projections = draw_projections(32, 32, generator=torch.Generator().manual_seed(0))
    points = clustering.draw_tokens((2, 3), 60, projections)
    expected = literal_clustering(points, projections)
    assert not torch.equal(expected, points)  # some clusters have several members
    candidates = [
        partial(clustering.cluster_by_ops, implementation="pytorch"),
        clustering.cluster_by_sorting,
        clustering.cluster_by_unique,
        clustering.cluster_by_matrix_keys,
        clustering._exactly,
    ]
    if IS_COMPILED:
        candidates.append(partial(clustering.cluster_by_ops, implementation="compiled"))
    for formulation in candidates:
        torch.testing.assert_close(formulation(points, projections).float(), expected)


def test_tokens_make_as_many_clusters_as_intended() -> None:
    projections = draw_projections(32, 32, generator=torch.Generator().manual_seed(0))
    points = clustering.draw_tokens((1, 8), 1050, projections)
    clusters = clustering.group_by_key(clustering.hash_keys(points, projections))
    assert 0.24 < clusters.num_clusters.double().mean() / 1050 < 0.29
    assert not clustering._is_close_to_border(points, projections).any()


def test_keys_of_dat_can_be_sampled_by_the_attention_operator() -> None:
    layer = dat.make_layer(CPU, 5, 8, 48, 8)
    positions = layer.positions.clone()
    positions[0, 0, 0] = torch.tensor([1.3, -1.2])  # more than a pixel outside
    layer = dat.Layer(**{**vars(layer), "positions": positions})
    expected = dat.sample_keys(layer.grouped, positions)
    assert expected[0, :, 0].eq(0).all()
    sampler = partial(dat.multi_scale_deformable_attention, implementation="pytorch")
    torch.testing.assert_close(dat.sample_by_attention(sampler, layer), expected)


def test_the_layer_of_dat_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = dat.make_layer(CPU, 5, 8, 48, 2)
    whole = dat.attend(layer)
    assert whole.shape == (1, 48, 5, 8)
    monkeypatch.setattr(dat, "_QUERIES_AT_ONCE", 7)
    torch.testing.assert_close(dat.attend(layer), whole)
