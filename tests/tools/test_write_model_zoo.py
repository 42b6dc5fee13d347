"""The model zoo: the committed document against quoted figures, and the generator on numbers."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from efficient_detr.errors import UserError
from tools import write_model_zoo
from tools.model_zoo.document import ENCODERS, MEAN_SIZE, SIZE, document
from tools.model_zoo.pictures import Point, accuracy_figure
from tools.model_zoo.published import SCORES, Model, read_published
from tools.write_model_zoo import DOCUMENT, PUBLISHED, ROOT, full_size_configs, main, read

SMALL = (400, 667)
PUBLISHED_FIGURES = read_published(PUBLISHED)
MODELS = PUBLISHED_FIGURES.models
VARIANTS = PUBLISHED_FIGURES.variants
CONFIGS = full_size_configs()

Table = list[dict[str, str]]


def tables(text: str) -> Iterator[Table]:
    """The Markdown tables of a document: a dict by column heads for each row."""
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            heads, _, *body = rows
            yield [dict(zip(heads, row, strict=True)) for row in body]
            rows = []


def name_of(row: dict[str, str]) -> str:
    """The config of a row, which may be a link."""
    return row["config"].partition("](")[0].strip("[`")


def family_rows(text: str) -> dict[str, dict[str, str]]:
    return {name_of(row): row for table in tables(text) if "baseline" in table[0] for row in table}


def quoted(model: Model) -> dict[str, str | float | None]:
    """What the quoted columns of a family's table must say."""
    return {
        "epochs, quoted": model.epochs or None,
        "AP, quoted": model.results[0].scores["AP"] if model.results else None,
        "parameters, quoted": model.parameters,
        "GFLOPs, quoted": model.gflops.value if model.gflops else None,
    }


def agree(cell: str, value: str | float | None) -> bool:
    if value is None:
        return cell == "-"
    return cell == value if isinstance(value, str) else float(cell.removesuffix(" M")) == value


def columns_agree(row: dict[str, str], model: Model) -> bool:
    expected = quoted(model)
    assert {head for head in row if head.endswith("quoted")} == set(expected)
    return all(agree(row[head], value) for head, value in expected.items())


# The committed document ----------------------------------------------------------------------


def test_document_has_each_config_with_its_quoted_figures() -> None:
    rows = family_rows(DOCUMENT.read_text(encoding="utf-8"))
    assert sorted(rows) == sorted([*CONFIGS, *VARIANTS]) == sorted(MODELS)
    for name, row in rows.items():
        assert columns_agree(row, MODELS[name]), name


def test_document_quotes_every_result_with_its_source() -> None:
    published = read_published(PUBLISHED)
    text = DOCUMENT.read_text(encoding="utf-8")
    found = [row for table in tables(text) if "source" in table[0] for row in table]
    found = [row for row in found if "AP, quoted" in row]
    expected = [(model.config, one) for model in MODELS.values() for one in model.results]
    assert len(found) == len(expected)
    for row, (config, result) in zip(found, expected, strict=True):
        assert name_of(row) == config
        assert agree(row["epochs, quoted"], result.epochs or None)
        assert agree(row["parameters, quoted"], result.parameters)
        assert row["source"] == published.sources[result.source]
        for score in SCORES:
            assert agree(row[f"{score}, quoted"], result.scores.get(score))


def test_each_column_of_ap_parameters_and_gflops_says_whose_they_are() -> None:
    for table in tables(DOCUMENT.read_text(encoding="utf-8")):
        for head in table[0]:
            if any(word in head for word in ("AP", "parameters", "GFLOPs")):
                assert ("quoted" in head) != ("measured" in head)


def test_pictures_of_the_document_are_there() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name in ("zoo_accuracy.png", "zoo_encoder.png"):
        assert f"({name})" in text
        assert imread(DOCUMENT.with_name(name)).std() > 0.01


def test_differences_from_the_authors_code_are_explained() -> None:
    """But for 0.006 GFLOPs, and for code after a paper; the total is within 0.5 % of theirs."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (table,) = [table for table in tables(text) if "unexplained" in table[0]]
    assert len([row for row in table if row["part"] == "model"]) == sum(
        model.code is not None for model in MODELS.values()
    )
    name = ""
    for row in table:
        name = name_of(row) or name
        code = MODELS[name].code
        assert code is not None
        assert abs(float(row["unexplained"])) < (0.25 if code.reconstruction else 0.006)
        theirs, ours = float(row["authors' code, measured"]), float(row["ours, measured"])
        assert row["part"] == "encoder" or ours == pytest.approx(theirs, rel=5e-3)


def test_arrows_are_between_equal_trainings() -> None:
    """Only ACT's is shorter than that of its dense model, from which it starts."""
    pairs = [(model, MODELS[model.replaces]) for model in MODELS.values() if model.replaces]
    assert len(pairs) >= 6
    for model, dense in pairs:
        assert model.epochs == dense.epochs or "DETR-DC5" in model.epochs


# The generator ---------------------------------------------------------------------------------


def entry(total: float) -> dict[str, Any]:
    """What an analysis says about a config."""
    return {
        "gflops": {"total": total, "backbone": total / 2, "selection": 3.0, "encoder": total / 4},
        "parameters": {"total": 1_234_567, "trainable": 1_000_000, "stages": {}},
        "data": {"tokens-total": 100.0, "tokens-encoder-0": 50.0, "tokens-encoder-1": 20.0},
    }


def timing(ms: float) -> dict[str, Any]:
    """What a benchmark says about a config."""
    stages = {name: {"ms": ms / 4, "spread": 0.1} for name in ("selection", "encoder", "decoder")}
    return {"inference": {"ms": ms, "spread": 0.1, "stages": stages}, "training": None}


class Files:
    """A folder with measurements to write the zoo from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.analysis = {name: entry(100.0 + 7 * i) for i, name in enumerate(CONFIGS)}
        self.benchmark = {name: timing(1000.0 + 10 * i) for i, name in enumerate(CONFIGS)}
        self.variant = entry(77.7)
        machine = {"cpu": "abacus", "device": "cpu"}
        self.run = {"machine": machine, "batch_size": 1, "precision": "fp32", "compile": False}

    def save(self, name: str, size: object, configs: dict[str, Any], **others: Any) -> Path:
        path = self.folder / name
        path.write_text(json.dumps({"image_size": size, "configs": configs, **others}))
        return path

    def paths(self) -> tuple[list[Path], Path]:
        """Write the files; returns those of analyses, and that of the benchmark."""
        small = {name: entry(10.0) for name in ENCODERS}
        analyses = [
            self.save("analysis.json", SIZE, self.analysis),
            self.save("analysis_small.json", SMALL, small),
            self.save("analysis_mean.json", MEAN_SIZE, {"detr": entry(86.5)}),
            *(
                self.save(
                    f"{name}.json",
                    SIZE,
                    {variant.config: self.variant},
                    overrides=list(variant.overrides),
                )
                for name, variant in VARIANTS.items()
            ),
        ]
        return analyses, self.save("benchmark.json", SIZE, self.benchmark, **self.run)

    def text(self, *, results: Sequence[str] = (), others: Sequence[Path] = ()) -> str:
        """The document, also from the results of evaluations and other benchmarks."""
        analyses, benchmark = self.paths()
        return document(read(analyses, [benchmark, *others], results))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_measured_numbers_are_those_of_the_files(files: Files) -> None:
    files.analysis["focus_detr"] = entry(183.190)
    files.benchmark["focus_detr"]["inference"].update(ms=999.0, cpu_ms=300.0)
    files.benchmark["dino"]["inference"].update(ms=400.0, cpu_ms=None)
    analyses, benchmark = files.paths()
    output = files.folder / "zoo.md"
    command = ["--analysis", *map(str, analyses), "--benchmark", str(benchmark)]
    assert main([*command, "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    rows = family_rows(text)
    assert sorted(rows) == sorted(MODELS)
    for name in VARIANTS:
        assert rows[name]["GFLOPs, measured"] == "77.70"
    row = rows["focus_detr"]
    assert columns_agree(row, MODELS["focus_detr"])
    assert row["AP, measured"] == "-"
    assert row["parameters, measured"] == "1,234,567"
    assert row["GFLOPs, measured"] == "183.19"
    assert row["ours / authors' code, measured"] == "1.0000"
    assert row["encoder GFLOPs, measured"] == "45.80 + 3.00 *"
    assert row["latency / baseline's, measured"] == "0.75"
    assert rows["dino"]["latency / baseline's, measured"] == "-"
    assert "cpu abacus" in text
    assert "50, 20 | of 100" in text
    assert imread(files.folder / "zoo_accuracy.png").std() > 0.01
    assert imread(files.folder / "zoo_encoder.png").std() > 0.01


def test_quoted_gflops_are_compared_at_the_size_of_their_mean(files: Files) -> None:
    text = files.text()
    head = "ours / quoted"
    (table,) = [table for table in tables(text) if head in table[0]]
    ratios = {name_of(row): row[head] for row in table}
    assert ratios["detr"] == f"{86.5 / 86:.3f}"
    assert ratios["detr_dc5"] == "-"  # not measured
    assert ratios["dino"] == "-"  # nobody says how it was counted


def test_encoders_by_image_size(files: Files) -> None:
    """With the selection; times are computing times where there are any."""
    files.analysis["dino"] = entry(200.0)
    files.benchmark["dino"] = timing(400.0)
    files.benchmark["dino"]["inference"]["stages"]["encoder"]["cpu_ms"] = 250.0
    text = files.text()
    (table,) = [table for table in tables(text) if "encoder, with its selection" in table[0]]
    assert len(table) == len(ENCODERS)
    (row,) = [row for row in table if "DINO" in row["encoder, with its selection"]]
    assert row["800x1333"] == "53.0 G, 350 ms"
    assert row["400x667"] == "5.5 G, - ms"


def test_clusters_of_random_weights_are_shown(files: Files) -> None:
    data = {"cluster-ratio-encoder-0": 0.9, "cluster-ratio-encoder-1": 0.25, "dense-encoder-0": 1.0}
    files.analysis["act_detr"]["data"] = data
    text = files.text()
    assert "0.900, 0.250 | 1 of 2 layers fell back to dense attention |" in text


def test_measured_accuracy(files: Files) -> None:
    results = files.folder / "results.json"
    results.write_text(json.dumps({"bbox": {"AP": 12.34, "APl": None}, "flops": {"GFLOPs": 0.5}}))
    text = files.text(results=[f"quickstart={results}", f"detr={results}"])
    assert family_rows(text)["detr"]["AP, measured"] == "12.3"
    (table,) = [table for table in tables(text) if "AP50, measured" in table[0]]
    assert [name_of(row) for row in table] == ["quickstart", "detr"]
    assert table[0]["APl, measured"] == table[0]["parameters, measured"] == "-"


def test_ratios_come_from_one_run(files: Files) -> None:
    other = files.save("other.json", SIZE, {"dino": files.benchmark.pop("dino")}, **files.run)
    rows = family_rows(files.text(others=[other]))
    assert rows["focus_detr"]["latency / baseline's, measured"] == "-"
    assert rows["act_detr"]["latency / baseline's, measured"] != "-"


def test_what_was_not_timed_is_named(files: Files) -> None:
    files.benchmark["detr"]["inference"] = None  # out of memory
    del files.benchmark["dino_5scale"]
    text = files.text()
    names = ", ".join(f"`{name}`" for name in sorted(["detr", "dino_5scale", *VARIANTS]))
    assert f"Not timed: {names}." in text
    assert family_rows(text)["smca_detr"]["latency / baseline's, measured"] == "-"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda files: files.analysis.pop("dino"), ["analyses lack dino", "make zoo"]),
        (lambda files: files.analysis.update(gone=entry(1.0)), ["analysis.json", "gone"]),
        (lambda files: files.analysis.update(dino={}), ["analysis.json", '"configs.dino.gflops"']),
        (lambda files: files.analysis["dino"]["gflops"].pop("total"), ["dino.gflops.total"]),
        (lambda files: files.analysis["dino"]["gflops"].update(total="1"), ["dino.gflops.total"]),
        (lambda files: files.analysis["dino"].update(gflops=3), ['"configs.dino.gflops"']),
        (lambda files: files.analysis["dino"].update(parameters={}), ["dino.parameters.total"]),
        (lambda files: files.analysis["dino"].pop("parameters"), ["dino.parameters"]),
        (lambda files: files.analysis["dino"]["data"].update(x=math.nan), ["dino.data.x", "nan"]),
        (lambda files: files.run.update(overrides=["a.b=1"]), ["benchmark.json", "a.b=1"]),
        (lambda files: files.run.update(checkpoint="x.pth"), ["benchmark.json", "checkpoint"]),
        (lambda files: files.benchmark["dino"]["inference"].pop("ms"), ["dino.inference.ms"]),
        (lambda files: files.run.pop("machine"), ["benchmark.json", '"machine"']),
        (
            lambda files: files.benchmark["dino"]["inference"]["stages"]["encoder"].pop("ms"),
            ["benchmark.json", "dino.inference.stages.encoder.ms"],
        ),
        (lambda files: files.benchmark.clear(), ["benchmarks", "800x1333"]),
        (lambda files: files.benchmark.update(dino=[]), ["benchmark.json", '"configs.dino"']),
    ],
)
def test_stale_files(files: Files, spoil: Any, words: list[str]) -> None:
    spoil(files)
    with pytest.raises(UserError) as caught:
        files.text()
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["no JSON"]),
        ("[]", ["no JSON object"]),
        ('{"configs": {}}', ['"image_size" is missing', "--image-size"]),
        ('{"image_size": null}', ['"image_size"', "size of images", "--image-size"]),
        ('{"image_size": ["a", "b"]}', ['"image_size"', "size of images"]),
        (json.dumps({"image_size": SIZE, "machine": {"cpu": None}}), ['"machine.cpu"']),
    ],
)
def test_unfit_benchmarks(files: Files, content: str, words: list[str]) -> None:
    path = files.folder / "unfit.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        files.text(others=[path])
    assert all(word in str(caught.value) for word in ["unfit.json", *words])


def test_runs_on_different_machines_are_not_compared(files: Files) -> None:
    run = {**files.run, "machine": {"cpu": "slide rule", "device": "cpu"}}
    other = files.save("other.json", SMALL, {}, **run)
    with pytest.raises(UserError, match=r"benchmark\.json and .*other\.json differ in machine"):
        files.text(others=[other])


def test_a_config_measured_twice(files: Files) -> None:
    other = files.save("other.json", SIZE, {"dino": timing(1.0)}, **files.run)
    with pytest.raises(UserError, match=r"other\.json both have dino at 800x1333"):
        files.text(others=[other])


@pytest.mark.parametrize("text", ["nobody=results.json", "detr", "detr=missing.json"])
def test_unfit_results(files: Files, text: str) -> None:
    with pytest.raises(UserError) as caught:
        files.text(results=[text])
    assert text.partition("=")[2] in str(caught.value)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"bbox": {"AP": None}}, "bbox.AP"),
        ({"bbox": {"AP": 1.0, "AP50": "x"}}, "bbox.AP50"),
        ({"bbox": {"AP": 1.0}, "flops": None}, "flops"),
        ({"bbox": {"AP": 1.0}, "flops": {"GFLOPs": "x"}}, "flops.GFLOPs"),
        ({"flops": {}}, "bbox"),
    ],
)
def test_results_that_are_none(files: Files, content: dict[str, Any], key: str) -> None:
    path = files.folder / "unfit.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        files.text(results=[f"detr={path}"])
    assert all(word in str(caught.value) for word in ["unfit.json", f'"{key}"'])


def test_a_failure_leaves_the_old_files(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    analyses, _ = files.paths()
    output = files.folder / "docs" / "zoo.md"
    output.parent.mkdir()
    old = [output, *(output.with_name(name) for name in ("zoo_accuracy.png", "zoo_encoder.png"))]
    for path in old:
        path.write_text("old")
    command = ["--analysis", *map(str, analyses), "--output", str(output)]

    monkeypatch.setattr(write_model_zoo, "document", lambda zoo: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(command)
    monkeypatch.undo()
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.endswith(output.name):
            raise OSError("disk is full")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(command) == 2
    assert "disk is full" in capsys.readouterr().err
    assert sorted(output.parent.iterdir()) == sorted(old)
    assert all(path.read_text() == "old" for path in old)


def test_command_says_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--analysis", "nowhere.json"]) == 2
    assert "nowhere.json" in capsys.readouterr().err


# The quoted figures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("baseline: dino\n", "baseline: dina\n", ["baseline", '"dina"', "focus_detr"]),
        ("replaces: dino\n", "replaces: dina\n", ["replaced model", '"dina"', "focus_detr"]),
        ("{source: act_second_hand", "{source: hearsay", ["source", '"hearsay"', "act_detr"]),
        ("AP50: 62.4", "AP51: 62.4", ["AP51"]),
        ("families:", "family:", ["families"]),
    ],
)
def test_unfit_figures(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    content = PUBLISHED.read_text(encoding="utf-8")
    assert old in content
    path = tmp_path / "figures.yaml"
    path.write_text(content.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match="figures.yaml") as caught:
        read_published(path)
    assert all(word in str(caught.value) for word in words)


def test_labels_do_not_cover_each_other() -> None:
    """Models of nearly the same cost and accuracy."""
    points = [
        Point(label=f"model {i}", family="one", gflops=100 + i, precision=40 + 0.1 * i)
        for i in range(6)
    ]
    figure = accuracy_figure(points, size=SIZE)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# The target of the Makefile ----------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_zoo_measures_what_the_document_needs(tmp_path: Path) -> None:
    command = ["make", "--dry-run", "zoo", f"ZOO={tmp_path}", f"VENV={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in CONFIGS:
        assert result.stdout.count(f"--json {tmp_path}/analysis/800x1333/{name}.json") == 1
    assert "--results quickstart=output/quickstart/results.json" in result.stdout
    commands = result.stdout.replace("\\\n", " ").splitlines()
    for tool, size, names in [
        ("analyze_model", "850x1040", [name for name in MODELS if is_mean(MODELS[name])]),
        ("analyze_model", "400x667", ENCODERS),
        ("benchmark", "400x667", ENCODERS),
        ("benchmark", "800x1333", CONFIGS),
    ]:
        (command_line,) = [
            line.split()
            for line in commands
            if f"tools/{tool}.py" in line and f"/{size}.json" in line
        ]
        assert tool != "benchmark" or {"--threads", "--rounds"} < set(command_line)
        files = {word for word in command_line if word.startswith("configs/")}
        assert files == {f"configs/{name}.py" for name in names}
        assert " ".join(command_line).count("--image-size " + size.replace("x", " ")) == 1
    for name, variant in VARIANTS.items():
        for size in ("800x1333", "850x1040"):
            assert any(
                f"--json {tmp_path}/analysis/{size}/variants/{name}.json" in line
                and f"--image-size {size.replace('x', ' ')} " in line
                and f"configs/{variant.config}.py" in line
                and line.endswith("--opts " + " ".join(variant.overrides))
                for line in (" ".join(one.split()) for one in commands)
            )


def is_mean(model: Model) -> bool:
    """Whether the published GFLOPs are a mean over images."""
    if model.gflops is None or model.config in VARIANTS:
        return False
    return PUBLISHED_FIGURES.protocols[model.gflops.protocol].mean_image
