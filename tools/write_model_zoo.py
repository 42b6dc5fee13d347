"""Write docs/model_zoo.md: what the models cost here, beside what is published about them.

    python -m tools.write_model_zoo --analysis output/zoo/analysis/*/*.json \\
        --benchmark output/zoo/benchmark_*.json --results quickstart=output/quickstart/results.json

`make zoo` measures all that and runs it. Analyses are files of `tools/analyze_model.py --json`, and
must have every full-size config at 800 x 1333 pixels; benchmarks are files of `tools/benchmark.py
--json`, from one machine. Other image sizes are for the picture of encoders. Beside the document go
`zoo_accuracy.png` and `zoo_encoder.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from efficient_detr.engine.commands import report_user_error
from efficient_detr.errors import UserError
from efficient_detr.files import replaced_file
from tools.model_zoo.document import (
    ENCODERS,
    MEAN_SIZE,
    SIZE,
    Zoo,
    cluster_ratios,
    document,
    encoder_gflops,
    encoder_milliseconds,
)
from tools.model_zoo.measured import Measurements, read_analyses, read_benchmarks, read_results
from tools.model_zoo.pictures import EncoderCurve, Point, accuracy_figure, encoder_figure
from tools.model_zoo.published import read_published

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "model_zoo.md"
PUBLISHED = ROOT / "tools" / "published_figures.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, or 2 after an error that the user can put right.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--analysis", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--benchmark", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument(
        *("--results",),
        nargs="+",
        default=[],
        metavar="CONFIG=FILE",
        help="results.json of evaluations, with the config's name without folder and .py",
    )
    parser.add_argument("--output", type=Path, default=DOCUMENT, metavar="FILE")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write(read(arguments.analysis, arguments.benchmark, arguments.results), arguments.output)
    except UserError as error:
        return report_user_error(error)
    return 0


def full_size_configs() -> list[str]:
    """Names of the detectors in configs/, without the small ones of the quickstart."""
    names = (path.stem for path in sorted((ROOT / "configs").glob("*.py")))
    return [name for name in names if not name.startswith("quickstart")]


def read(analyses: Sequence[Path], benchmarks: Sequence[Path], results: Sequence[str]) -> Zoo:
    """Read everything and see that it fits together.

    Args:
        analyses: files of `tools/analyze_model.py`.
        benchmarks: files of `tools/benchmark.py`.
        results: evaluations, "config=file".

    Raises:
        UserError: a file is not what it should be, or something does not fit.
    """
    configs = full_size_configs()
    published = read_published(PUBLISHED)
    different = sorted({*configs, *published.variants} ^ set(published.models))
    if different:
        raise UserError(
            f"configs/ and {PUBLISHED.name} must be about the same models, but one of them lacks "
            f"{', '.join(different)}."
        )
    models = {(name, ()): name for name in configs} | {
        (variant.config, variant.overrides): name for name, variant in published.variants.items()
    }
    zoo = Zoo(
        published,
        read_analyses(analyses, models),
        read_benchmarks(benchmarks, models),
        dict(evaluation(text) for text in results),
    )
    check_complete(zoo.analyses, list(published.models), "analyses", "tools/analyze_model.py")
    if benchmarks:
        check_size(zoo.benchmarks, "benchmarks", "tools/benchmark.py")
    return zoo


def evaluation(text: str) -> tuple[str, dict[str, dict[str, float]]]:
    """Read what "config=file" names.

    Raises:
        UserError: there is no such config, or the file is no result of an evaluation.
    """
    config, _, file = text.partition("=")
    if not file or not (ROOT / "configs" / f"{config}.py").exists():
        raise UserError(f"--results {text}: give the name of a config in configs/, = and a file.")
    return config, read_results(Path(file))


def check_complete(found: Measurements, configs: Sequence[str], what: str, tool: str) -> None:
    """Refuse measurements that lack a model."""
    check_size(found, what, tool)
    missing = [name for name in configs if name not in found.at(SIZE)]
    if missing:
        raise UserError(
            f"The {what} lack {', '.join(missing)} at {SIZE[0]}x{SIZE[1]}: "
            f"run make zoo, or {tool} with these configs, of variants with their --opts."
        )


def check_size(found: Measurements, what: str, tool: str) -> None:
    """Refuse measurements of other image sizes alone."""
    if not found.at(SIZE):
        sizes = ", ".join(f"{height}x{width}" for height, width in sorted(found.entries))
        raise UserError(
            f"The {what} are for images of {sizes or 'no size'}, but the tables need "
            f"{SIZE[0]}x{SIZE[1]}: run {tool} with --image-size {SIZE[0]} {SIZE[1]}."
        )


def write(zoo: Zoo, output: Path) -> None:
    """Write the document, and the pictures beside it; all of them, or after an error none.

    Raises:
        UserError: one of the files cannot be written.
    """
    on_cpu = zoo.benchmarks.settings.get("machine", {}).get("device") == "cpu"
    clock = "computing time" if on_cpu else "latency"
    contents = {
        "zoo_accuracy.png": png(accuracy_figure(accuracy_points(zoo), size=SIZE)),
        "zoo_encoder.png": png(encoder_figure(encoder_curves(zoo), clock=clock)),
        output.name: document(zoo).encode(),
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as files:
            for name, content in contents.items():
                files.enter_context(replaced_file(output.with_name(name))).write_bytes(content)
    except OSError as error:
        raise UserError(f"{output} and its pictures cannot be written: {error}.") from error
    logger.info("wrote %s", output)


def png(figure: Figure) -> bytes:
    """A picture as the content of a file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def accuracy_points(zoo: Zoo) -> list[Point]:
    """The models that have an AP."""
    labels = {name: model.label for name, model in zoo.published.models.items()}
    return [
        Point(
            label=model.label,
            family=family.title,
            gflops=zoo.analyses.at(SIZE)[model.config]["gflops"]["total"],
            precision=model.precision,
            origin=labels.get(model.replaces, ""),
            provisional=bool(cluster_ratios(zoo.analyses.at(SIZE)[model.config])),
        )
        for family in zoo.published.families
        for model in family.models
        if model.precision is not None
    ]


def encoder_curves(zoo: Zoo) -> list[EncoderCurve]:
    """GFLOPs and times of the encoders that stand for a kind of attention."""
    curves = []
    for config, label in ENCODERS.items():
        gflops = {
            size: value
            for size, entries in zoo.analyses.entries.items()
            if size != MEAN_SIZE and config in entries
            if (value := encoder_gflops(entries[config])) is not None
        }
        times = {
            size: value
            for size, entries in zoo.benchmarks.entries.items()
            if config in entries
            if (value := encoder_milliseconds(entries[config])) is not None
        }
        curves.append(EncoderCurve(label, gflops, times))
    return curves


if __name__ == "__main__":
    sys.exit(main())
