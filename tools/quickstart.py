#!/usr/bin/env python
"""Generate pictures of handwritten digits, train a small detector on them, show how good it is.

    python tools/quickstart.py
    python tools/quickstart.py train.max_iter=200 train.output_dir=output/short

Arguments are overrides of configs/quickstart.py. Into the config's output folder go, beside what
every training writes:

    results.json      AP, AP50 (0 to 1), gflops, parameters, train_seconds; below "bbox" (0 to 100)
                      and "flops" all that was measured
    predictions.png   predictions beside the ground truth
    kept_tokens.png   the tokens that the encoder keeps, if the model selects tokens
    curves.png        loss, average precision and learning rate during training
"""

from __future__ import annotations

import os

# Read when torch is loaded: threads that spin while they wait make training many times slower
# where another process shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser
from omegaconf import DictConfig
from tabulate import tabulate
from tqdm import tqdm

from efficient_detr.data import generate_digits
from efficient_detr.data.datasets import class_names
from efficient_detr.engine.building import build_model
from efficient_detr.engine.checkpointer import AtomicCheckpointer
from efficient_detr.engine.checks import check_config, dataset_names, load_config
from efficient_detr.engine.commands import report_user_error
from efficient_detr.engine.train import run, save_results
from efficient_detr.errors import UserError
from efficient_detr.visualization import (
    collect_token_examples,
    detection_example,
    save_curves,
    save_predictions,
    save_tokens,
)

CONFIG_FILE = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"
FINAL_WEIGHTS = "model_final.pth"
SHOWN_PREDICTIONS = 12
SHOWN_TOKENS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: overrides of the config; None for the command line of the process.

    Returns:
        The exit status: 0, or 2 after an error that the user can put right.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="path.to.key=value")
    try:
        quickstart(parser.parse_args(argv).overrides)
    except UserError as error:
        return report_user_error(error)
    return 0


def quickstart(overrides: Sequence[str]) -> None:
    """Generate, train, evaluate, draw and print the table."""
    cfg = load_config(str(CONFIG_FILE), overrides)
    check_config(cfg)
    generate_with_progress_bar()
    arguments = ["--config-file", str(CONFIG_FILE), *overrides]
    start = time.time()
    run(cfg, default_argument_parser().parse_args(arguments))
    output_dir = Path(cfg.train.output_dir)
    # The final weights are written between the last iteration and the last evaluation.
    train_seconds = (output_dir / FINAL_WEIGHTS).stat().st_mtime - start
    results_file = output_dir / "results.json"
    results = json.loads(results_file.read_text(encoding="utf-8"))
    summary = {**summarize(results, train_seconds), **results}
    save_results(summary, str(results_file))
    pictures = draw_pictures(cfg, output_dir)
    print(describe(summary))
    print(f"\nResults: {results_file}\nPictures: {', '.join(str(path) for path in pictures)}")


def generate_with_progress_bar() -> None:
    """Generate the data set unless it is there."""
    with tqdm(desc="Generating pictures", unit="picture", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        generate_digits(progress=show)


def summarize(
    results: Mapping[str, Mapping[str, float | None]], train_seconds: float
) -> dict[str, Any]:
    """Pick the headline numbers of an evaluation.

    Args:
        results: what the evaluation wrote: `bbox` with AP and AP50 from 0 to 100, and `flops`.
        train_seconds: wall-clock time from the start to the final weights.

    Returns:
        `AP` and `AP50` from 0 to 1, `gflops` (10^9 multiply-adds an image), `parameters` and
        `train_seconds`; None for what could not be measured.
    """
    accuracy, cost = results.get("bbox", {}), results.get("flops", {})
    precisions = {name: accuracy.get(name) for name in ("AP", "AP50")}
    parameters = cost.get("parameters")
    return {
        **{name: None if value is None else value / 100 for name, value in precisions.items()},
        "gflops": cost.get("GFLOPs"),
        "parameters": None if parameters is None else int(parameters),
        "train_seconds": round(train_seconds, 1),
    }


@torch.no_grad()
def draw_pictures(cfg: DictConfig, output_dir: Path) -> list[Path]:
    """Draw what the trained model predicts and keeps, and how the training went.

    Args:
        cfg: the config that was trained.
        output_dir: where its training wrote, and where the pictures go.

    Returns:
        The pictures.
    """
    model: Any = build_model(cfg).to(torch.device(cfg.train.device)).eval()
    AtomicCheckpointer(model).load(str(output_dir / FINAL_WEIGHTS))
    records = {record["image_id"]: record for record in instantiate(cfg.dataloader.test.dataset)}
    batches = instantiate(cfg.dataloader.test)
    inputs = list(itertools.islice(itertools.chain.from_iterable(batches), SHOWN_PREDICTIONS))
    examples = [
        detection_example(records[item["image_id"]], output["instances"])
        for item, output in zip(inputs, model(inputs), strict=True)
    ]
    names = class_names(dataset_names(cfg, "test")[0]) or [str(k) for k in range(model.num_classes)]
    pictures = [save_predictions(examples, names, output_dir / "predictions.png")]
    tokens = collect_token_examples(model, inputs[:SHOWN_TOKENS])
    if tokens:
        pictures.append(save_tokens(tokens, output_dir / "kept_tokens.png"))
    pictures.append(save_curves(output_dir / "metrics.json", output_dir / "curves.png"))
    return pictures


def describe(summary: Mapping[str, Any]) -> str:
    """Return the final tables: accuracy and cost, then the cost of each stage.

    Args:
        summary: from `summarize`, with the `flops` of the evaluation.
    """
    total = summary["gflops"]
    headline = [
        _number(summary["AP"], ".3f"),
        _number(summary["AP50"], ".3f"),
        _number(total, ".3f"),
        _number(summary["parameters"], ","),
        _number(summary["train_seconds"], ".0f"),
    ]
    headers = ["AP", "AP50", "GFLOPs", "parameters", "training (s)"]
    tables = [_table(headers, [headline])]
    prefix = "GFLOPs-"
    stages = [
        [name.removeprefix(prefix), _number(value, ".4f"), _number(value / total, ".1%")]
        for name, value in summary.get("flops", {}).items()
        if name.startswith(prefix) and total and value
    ]
    if stages:
        tables.append(_table(["stage", "GFLOPs", "share"], stages, first="left"))
    return "\n" + "\n\n".join(tables)


def _table(headers: list[str], rows: list[list[str]], first: str = "right") -> str:
    """Return a table of formatted numbers; `first` aligns the first column."""
    alignment = [first] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=alignment)


def _number(value: float | None, form: str) -> str:
    """Return a formatted number, or a dash for one that was not measured."""
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
