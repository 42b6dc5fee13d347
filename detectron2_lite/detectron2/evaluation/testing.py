"""Results as flat dictionaries and as lines to paste into a table."""

import logging
from collections.abc import Mapping
from typing import Any


def print_csv_format(results: Mapping[str, Mapping[str, float]]) -> None:
    """Log the metrics of each task as comma-separated values, without those of single classes."""
    logger = logging.getLogger(__name__)
    for task, metrics in results.items():
        overall = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info("copypaste: Task: %s", task)
        logger.info("copypaste: %s", ",".join(overall))
        logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in overall.values()))


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Nested results with keys joined by slashes, e.g. ``bbox/AP``."""
    flat: dict[str, Any] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{k}": v for k, v in flatten_results_dict(value).items()})
        else:
            flat[key] = value
    return flat
