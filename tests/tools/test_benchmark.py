"""The benchmark of models: stages add up, work stays the same, and what cannot work is said."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QUICKSTART = str(ROOT / "configs" / "quickstart.py")

with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(ROOT / "tools"))
    bench: Any = importlib.import_module("benchmark")
    passes, report, stages, timing = (
        importlib.import_module(f"kernel_benchmark.{name}")
        for name in ("passes", "model_report", "stages", "timing")
    )

CLASSIFIER = """
from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer
from efficient_detr.modeling.classifier import ImageClassifier

model = L(ImageClassifier)(
    backbone=L(SwinTransformer)(
        embed_dim=8, depths=[1, 1], num_heads=[1, 1], drop_path_rate=0.0, out_indices=(1,)
    ),
    feature="p1", channels=16, num_classes=3,
)
"""


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    """A config of a model without losses."""
    path = tmp_path / "classifier.py"
    path.write_text(CLASSIFIER)
    return str(path)


# Stages ------------------------------------------------------------------------------------------


class FakeWatch:
    """A clock that only work advances; computing takes two threads."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waits = 0

    def now(self) -> float:
        return self.time

    def wait(self) -> None:
        self.waits += 1

    def between(self, start: float, end: float) -> Any:
        return stages.Duration(end - start, 2 * (end - start))


class Work(nn.Module):
    """Takes some seconds before and after each of its parts, which run one after the other."""

    def __init__(self, watch: FakeWatch, seconds: float, *parts: nn.Module) -> None:
        super().__init__()
        self.watch, self.seconds, self.parts = watch, seconds, nn.ModuleList(parts)

    def forward(self) -> None:
        self.watch.time += self.seconds
        for part in self.parts:
            part()
            self.watch.time += self.seconds


def seconds_of(found: dict[str, Any]) -> dict[str, float]:
    return {name: one.seconds for name, one in found.items()}


def test_nested_stages_count_once() -> None:
    """The decoder has two heads of 10 s, in a list, and itself takes 3 x 1 s."""
    watch = FakeWatch()
    decoder = Work(watch, 1, Work(watch, 10), Work(watch, 10))
    heads = decoder.parts
    backbone = Work(watch, 100)
    model = Work(watch, 1000, backbone, decoder)
    timer = stages.StageTimer({"backbone": backbone, "decoder": decoder, "heads": heads}, watch)
    found = timer.measure(model)
    assert seconds_of(found) == {"other": 3000, "backbone": 100, "decoder": 3, "heads": 20}
    assert found["heads"].cpu_seconds == 40
    assert watch.waits == 2  # before and after the pass
    assert timer.in_order(found) == ["backbone", "decoder", "heads", "other"]
    assert seconds_of(timer.measure(backbone)) == {"other": 0, "backbone": 100}


def test_a_borrowed_module_counts_for_the_borrower() -> None:
    watch = FakeWatch()
    proposals = Work(watch, 10)
    selection = Work(watch, 1)
    selection.borrowed = [proposals]
    selection.register_forward_hook(lambda module, *_: module.borrowed[0]())
    model = Work(watch, 100, selection, proposals)
    timer = stages.StageTimer({"selection": selection, "proposals": proposals}, watch)
    # The borrowing hook was there first, so it runs before the timer's.
    assert seconds_of(timer.measure(model)) == {"other": 300, "selection": 11, "proposals": 10}


def test_phases_end_stages_and_leave_none_running() -> None:
    watch = FakeWatch()
    backbone = Work(watch, 10)
    timer = stages.StageTimer({"backbone": backbone}, watch)

    def step() -> None:
        backbone()
        timer.begin_phase("backward")
        watch.time += 5
        backbone()  # recomputed
        timer.begin_phase("optimizer")
        watch.time += 2

    timer.begin_phase("backward")  # of nothing that is measured
    for _ in range(2):
        found = timer.measure(step)
        assert seconds_of(found) == {"other": 0, "backbone": 10, "backward": 15, "optimizer": 2}
    assert timer.in_order(found) == ["backbone", "backward", "optimizer", "other"]


def test_a_pass_that_fails_leaves_the_timer_ready() -> None:
    watch = FakeWatch()
    part = Work(watch, 1)
    failing = Work(watch, 10, part)
    timer = stages.StageTimer({"outer": failing, "inner": part}, watch)
    handle = part.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        timer.measure(failing)
    handle.remove()
    failing()  # not measured
    assert seconds_of(timer.measure(failing)) == {"other": 0, "outer": 20, "inner": 1}


def test_nobody_waits_for_a_gpu_during_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.milliseconds = 250 * len(log)

        def elapsed_time(self, end: Event) -> int:
            assert log[-1] == "synchronize"
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    module = nn.Linear(1, 1)
    timer = stages.StageTimer({"part": module}, stages.stop_watch_for(torch.device("cuda")))
    found = timer.measure(lambda: module(torch.ones(1)))
    assert log == ["synchronize", *["record"] * 4, "synchronize"]
    assert found == {"other": stages.Duration(0.5, None), "part": stages.Duration(0.25, None)}


class TwoStages(nn.Module):
    """The second stage holds a third."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, features: Tensor) -> Tensor:
        return self.decoder(self.backbone(features))


def test_compiled_stages_are_timed_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = TwoStages()
    named = {"backbone": model.backbone, "decoder": model.decoder, "heads": model.decoder[1]}
    monkeypatch.setattr(passes, "COMPILER", compiler)
    monkeypatch.setattr(passes, "stage_modules", lambda _: named)
    images = torch.ones(2, 4)
    expected = model(images)
    timer = passes.make_timer(model, True, stages.stop_watch_for(CPU))
    for _ in range(2):
        assert set(timer.measure(lambda: model(images))) == {"backbone", "decoder", "other"}
    assert len(graphs) == 2  # one a stage: the hooks break none
    torch.testing.assert_close(model(images), expected)


def test_hooks_of_a_module_called_in_a_compiled_one_do_nothing() -> None:
    """A selection may call the proposals, which are a stage of their own."""
    model = TwoStages()
    timer = stages.StageTimer({"heads": model.decoder[1]}, stages.stop_watch_for(CPU))
    decoder = torch.compile(model.decoder, backend="eager", fullgraph=True)
    assert set(timer.measure(lambda: decoder(torch.ones(2, 4)))) == {"other"}
    assert set(timer.measure(lambda: model.decoder(torch.ones(2, 4)))) == {"heads", "other"}


# Work --------------------------------------------------------------------------------------------


def test_inputs_are_the_same_every_time() -> None:
    first, second = (passes.draw_batch((60, 90), 2, 3) for _ in range(2))
    assert not first[0]["image"].equal(first[1]["image"])
    for one, other in zip(first, second, strict=True):
        assert one["image"].shape == (3, 60, 90) and one["image"].dtype == torch.uint8
        assert one["image"].equal(other["image"])
        boxes = one["instances"].gt_boxes.tensor
        assert boxes.equal(other["instances"].gt_boxes.tensor)
        assert one["instances"].gt_classes.equal(other["instances"].gt_classes)
        assert len(boxes) == 7 and one["instances"].gt_classes.max() < 3
        assert (boxes >= 0).all() and (boxes <= torch.tensor([90, 60, 90, 60])).all()
        assert ((boxes[:, 2:] - boxes[:, :2]) > 2).all()


def test_a_training_step_does_everything_but_change_the_weights() -> None:
    arguments = bench.parse(["--config-file", QUICKSTART, "--image-size", "64", "96", "--training"])
    inference, training = bench.make_contenders(QUICKSTART, arguments, stages.stop_watch_for(CPU))
    step = training.work
    model = step.model
    before = {name: value.clone() for name, value in model.named_parameters()}
    found = [training.timer.measure(step) for _ in range(2)]
    assert set(found[0]) == set(found[1])
    assert {"backbone", "decoder", "denoising", "losses", "backward"} < set(found[0])
    assert training.timer.in_order(found[0])[-4:] == ["losses", "backward", "optimizer", "other"]
    assert all(one.equal(before[name]) for name, one in model.named_parameters())
    assert all(one.grad is None for one in model.parameters())
    # AdamW keeps two numbers for each, and the count of its steps.
    numbers = sum(one.numel() for one in model.parameters())
    states = step.optimizer.state
    assert len(states) == len(before) and all(int(one["step"]) == 2 for one in states.values())
    assert step.persistent_bytes == 4 * (2 * numbers + len(before))
    # With the same model, inference has no training left in it.
    names = set(inference.timer.measure(inference.work))
    assert {"decoder", "other"} < names and not names & {"losses", "denoising", "backward"}
    assert inference.work.persistent_bytes == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(precision: str, classifier: str) -> None:
    arguments = ["--config-file", classifier, "--image-size", "32", "32"]
    arguments = bench.parse([*arguments, "--precision", precision])
    (contender,) = bench.make_contenders(classifier, arguments, stages.stop_watch_for(CPU))
    found: list[torch.dtype] = []
    contender.work._model.head.register_forward_hook(lambda *args: found.append(args[2].dtype))
    contender.take_turn()
    assert found == [bench.PRECISIONS[precision]]
    assert set(contender.samples[0]) == {"backbone", "head", "other"}


# Results -----------------------------------------------------------------------------------------


def contender(name: str, *turns: tuple[float, float | None], problem: str = "") -> Any:
    """A contender whose turns have spent a quarter of (seconds, computing seconds) in a stage."""
    samples = [
        {
            "neck": stages.Duration(wall / 4, cpu and cpu / 4),
            "other": stages.Duration(3 * wall / 4, cpu and 3 * cpu / 4),
        }
        for wall, cpu in turns
    ]
    return passes.Contender(
        f"configs/{name}.py", "inference", "", None, None, ["neck", "other"], samples, 5000000,
        problem,
    )  # fmt: skip


def arguments_for(*more: str) -> Any:
    return bench.parse(["--config-file", "a.py", "--batch-size", "2", *more])


def test_numbers() -> None:
    contenders = [
        contender("a", (4, 2), (2, 1), (3, 2)),
        contender("b", (4, 8), (6, 8), (4, 8)),
        contender("c", problem="c ran out of memory."),
    ]
    found = report.as_json(contenders, arguments_for())
    assert found["problems"] == ["c ran out of memory."]
    assert found["configs"]["c"] == {"inference": None, "training": None}
    a, b = (found["configs"][name]["inference"] for name in "ab")
    assert (a["ms"], a["cpu_ms"], a["spread"]) == (3000, 2000, 0.5)
    assert a["images_per_second"] == pytest.approx(2 / 3) and a["peak_bytes"] == 5000000
    assert a["stages"]["neck"] == {"ms": 750, "cpu_ms": 500, "spread": 0.5}
    assert (a["ratio"], b["ratio"]) == (1, 4)  # of computing times
    found = report.as_json(contenders, arguments_for("--baseline", "b"))["configs"]
    assert found["a"]["inference"]["ratio"] == 0.25
    found = report.as_json(contenders, arguments_for("--baseline", "c"))["configs"]
    assert found["a"]["inference"]["ratio"] is None
    gpu = [contender("a", (1, None)), contender("b", (3, None))]
    found = report.as_json(gpu, arguments_for())["configs"]["b"]["inference"]
    assert found["ratio"] == 3 and found["cpu_ms"] is None


def test_tables() -> None:
    contenders = [contender("a", (4, 2), (2, 1), (3, 2)), contender("b", problem="no memory")]
    lines = report.tables(contenders, arguments_for("--markdown", "--stages", "neck")).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "| a" in line]
    assert rows == [
        ["a", "3000.0", "50%", "2000.0", "0.67", "1.000", "5"],
        ["a", "500.0"],
    ]
    assert report.MEDIANS_NOTE in lines
    assert "Computing time of all threads of inference by stage, in ms" in lines
    assert not any("| b" in line or "raining" in line for line in lines)


def test_latencies_of_stages_on_a_gpu() -> None:
    printed = report.tables([contender("a", (1, None), (3, None))], arguments_for())
    assert "Latency of inference by stage, in ms" in printed
    assert "500.0 (+100%)" in printed


def test_everyone_starts_a_round() -> None:
    assert list(timing.round_robin("abc", 4)) == [
        list(order) for order in ("abc", "bca", "cab", "abc")
    ]
    assert timing.spread_of([0.0, 0.0]) == 0


# The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """What one config gives in a run with training: the JSON and the exit status."""
    path = tmp_path_factory.mktemp("benchmark") / "new" / "found.json"
    arguments = ["--config-file", QUICKSTART, "--image-size", "64", "96", "--batch-size", "2"]
    arguments += ["--rounds", "2", "--threads", "1", "--training", "--json", str(path)]
    status = bench.main([*arguments, "--opts", "model.detector.queries.num_queries=10"])
    return json.loads(path.read_text()), status


def test_command(run: tuple[dict[str, Any], int]) -> None:
    found, status = run
    assert status == 0
    assert found["machine"]["threads"] == 1 and found["machine"]["device"] == "cpu"
    settings = {key: found[key] for key in ("image_size", "batch_size", "precision", "compile")}
    assert settings == dict(image_size=[64, 96], batch_size=2, precision="fp32", compile=False)
    assert list(found["configs"]) == ["quickstart"]
    assert found["overrides"] == ["model.detector.queries.num_queries=10"]
    assert found["checkpoint"] is None
    kinds = found["configs"]["quickstart"]
    for measured in kinds.values():
        assert measured["images_per_second"] == pytest.approx(2000 / measured["ms"])
        assert measured["cpu_ms"] > 0 and measured["spread"] >= 0 and measured["ratio"] == 1
        parts = [stage["ms"] for stage in measured["stages"].values()]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(measured["ms"], rel=0.5)
        assert list(measured["stages"])[-1] == "other"
    assert set(kinds["inference"]["stages"]) >= {"backbone", "neck", "encoder", "decoder", "heads"}
    assert kinds["training"]["cpu_ms"] > kinds["inference"]["cpu_ms"]


def test_memory_of_training_has_the_optimizer_in_it(run: tuple[dict[str, Any], int]) -> None:
    kinds = run[0]["configs"]["quickstart"]
    inference, training = (kinds[kind]["peak_bytes"] for kind in ("inference", "training"))
    if inference is None:
        pytest.skip("this operating system does not tell the largest memory of a process")
    # More than half a million parameters with a gradient and two numbers of AdamW.
    assert training > inference + 3 * 4 * 500_000


def two_configs(classifier: str, folder: Path) -> list[str]:
    """Arguments for the classifier and another like it."""
    other = folder / "other.py"
    other.write_text(CLASSIFIER)
    return ["--config-file", classifier, str(other), "--image-size", "32", "32"]


def fail_at(number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let a pass of inference fail, counted from 1 over all configs; returns the passes begun."""
    calls: list[Any] = []
    work = passes.InferencePass.__call__

    def call(self: Any) -> None:
        calls.append(self)
        if len(calls) == number:
            raise error
        work(self)

    monkeypatch.setattr(passes.InferencePass, "__call__", call)
    return calls


def test_a_lack_of_memory_leaves_one_contender_out(
    classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The second config fails in its second turn, as a busy GPU may."""
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    calls = fail_at(4, error, monkeypatch)
    monkeypatch.setattr(bench, "in_own_process", lambda *_: {"inference": 1})
    arguments = two_configs(classifier, tmp_path)
    path = tmp_path / "found.json"
    status = bench.main([*arguments, "--rounds", "3", "--json", str(path)])
    assert status == bench.OUT_OF_MEMORY_STATUS
    sentence = "other ran out of memory in inference, with 1 x 32x32 pixels in fp32 on cpu."
    assert f"Left out: {sentence}" in capsys.readouterr().err
    found = json.loads(path.read_text())
    assert found["problems"] == [sentence]
    assert found["configs"]["other"] == {"inference": None, "training": None}
    assert found["configs"]["classifier"]["inference"]["peak_bytes"] == 1
    assert len(calls) == 2 + 4  # warm-up, three turns of one, one of the other


def test_an_interruption_keeps_what_was_measured(
    classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The second turn of the second config is the one that Ctrl-C ends."""
    calls = fail_at(5, KeyboardInterrupt(), monkeypatch)
    path = tmp_path / "found.json"
    arguments = two_configs(classifier, tmp_path)
    assert bench.main([*arguments, "--json", str(path)]) == 130
    printed, errors = capsys.readouterr()
    assert errors.splitlines()[-1] == "Interrupted"
    assert "fp32 on cpu, 1 round, " in printed
    configs = json.loads(path.read_text())["configs"]
    assert [configs[name]["inference"]["rounds"] for name in ("classifier", "other")] == [1, 1]

    calls[:] = [None] * 3  # in the warm-up, there is nothing to show
    assert bench.main([*arguments, "--json", str(tmp_path / "none.json")]) == 130
    assert not capsys.readouterr().out and not (tmp_path / "none.json").exists()


def test_times_are_kept_without_the_memory(
    classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As if the system had ended the process that measures it."""
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "nothing.py"))
    path = tmp_path / "found.json"
    arguments = ["--config-file", classifier, "--image-size", "32", "32", "--rounds", "1"]
    assert bench.main([*arguments, "--json", str(path)]) == 0
    assert "The memory of classifier at 32x32 could not be measured" in capsys.readouterr().err
    measured = json.loads(path.read_text())["configs"]["classifier"]["inference"]
    assert measured["peak_bytes"] is None and measured["ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, not 0."),
        (["--batch-size", "-1"], "--batch-size must be at least 1, not -1."),
        (["--image-size", "0", "5"], "--image-size 0 5: give 1 pixel or more for each side."),
        (["--baseline", "detr"], "--baseline detr is none of classifier."),
        (["--json", "/dev/null/found.json"], "--json /dev/null/found.json cannot be written"),
        (["--config-file", "a/x.py", "c.py", "b/x.py"], "a/x.py, b/x.py must differ in name"),
        (
            ["--image-size", "1000000", "1000000"],
            "--image-size 1000000 1000000 --batch-size 1: the i",
        ),
        (["--config-file", "nowhere.py"], "nowhere.py does not exist"),
        (["--training"], "classifier.py cannot be trained: its model has no losses; leave it out"),
        (["--stages", "neck"], "--stages neck: the stages of these configs are backbone, head, o"),
        (["--opts", "model.num_classes=0"], "classifier.py: model.num_classes=0"),
    ],
)
def test_errors(
    arguments: list[str], message: str, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config-file", classifier, "--image-size", "32", "32", "--rounds", "1"]
    assert bench.main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_training_needs_an_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "alone.py"
    load = f"from detectron2.config import LazyConfig\n\nmodel = LazyConfig.load({QUICKSTART!r})"
    path.write_text(f"{load}.model\n")
    assert bench.main(["--config-file", str(path), "--training"]) == 2
    assert f"{path} cannot be trained: it has no optimizer" in capsys.readouterr().err


def test_what_a_model_cannot_do_is_said_with_its_name(
    monkeypatch: pytest.MonkeyPatch, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("\"some_operator\" not implemented for 'Half'\nMore about it.")

    monkeypatch.setattr(passes.InferencePass, "__call__", fail)
    arguments = ["--config-file", classifier, "--image-size", "32", "40", "--precision", "fp16"]
    assert bench.main(arguments) == 2
    assert (
        "classifier.py: inference with 1 x 32x40 pixels in fp16 on cpu is not possible: "
        "\"some_operator\" not implemented for 'Half'\n" in capsys.readouterr().err
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--config-file", QUICKSTART, "--device", "cuda"]) == 2
    assert "--device cuda needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_command_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    arguments = ["--config-file", QUICKSTART, "--image-size", "256", "256", "--device", "cuda"]
    arguments += ["--rounds", "3", "--training", "--precision", "bf16", "--json", str(path)]
    assert bench.main(arguments) == 0
    for kind in ("inference", "training"):
        found = json.loads(path.read_text())["configs"]["quickstart"][kind]
        assert found["cpu_ms"] is None and found["peak_bytes"] > 0
        parts = [stage["ms"] for stage in found["stages"].values()]
        assert sum(parts) == pytest.approx(found["ms"], rel=0.3)
