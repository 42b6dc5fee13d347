"""Cost beside accuracy: one evaluation reports AP, GFLOPs, parameters, kept tokens and clusters.

:class:`FlopsEvaluator` is a Detectron2 evaluator that needs the model. A config cannot name the
model, so a config's ``dataloader.evaluator`` stays the accuracy evaluator alone, and whoever runs
the evaluation adds the cost with :func:`build_evaluators`::

    evaluator = build_evaluators(instantiate(cfg.dataloader.evaluator), model)
    results = inference_on_dataset(model, loader, evaluator)   # {"bbox": {...}, "flops": {...}}
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from efficient_detr.evaluation.data_dependence import DataRecorder, DataStatistics
from efficient_detr.evaluation.flops import (
    FlopCount,
    ParameterCount,
    count_flops,
    count_parameters,
    unwrap,
)

GIGA = 1e9
MEGA = 1e6

PADDED_HEADS = (
    "Heads with fewer clusters are padded to the head with most, and the padding is computed and "
    "counted: GFLOPs follow from most-clusters, not from the mean over the heads."
)
"""How numbers of clusters and GFLOPs belong together, for reports that have both."""

logger = logging.getLogger(__name__)


class FlopsEvaluator(DatasetEvaluator):
    """Measures what a model costs while another evaluator measures how good it is.

    FLOPs are counted on the first images of the data set, one image at a time, and averaged;
    counting costs about one more forward pass an image. In distributed evaluation the main process
    counts, so that the images and the result do not depend on the number of processes. Kept tokens
    and clusters are averaged over all images of all processes.

    A model that cannot be traced costs a warning, not the evaluation: the result then lacks the
    GFLOPs.

    Args:
        model: the model under evaluation; data-parallel wrappers are looked through. Token numbers
            are read from the output of its ``detector``, if it has one.
        num_images: count FLOPs on this many images, 0 or more.

    Raises:
        ValueError: ``num_images`` is negative.
    """

    def __init__(self, model: nn.Module, *, num_images: int = 10) -> None:
        if num_images < 0:
            raise ValueError(f"num_images must be 0 or more, but is {num_images}.")
        self._model = unwrap(model)
        self._num_images = num_images
        self._gave_up = False
        self._counts: list[FlopCount] = []
        self._data = DataRecorder(self._model)

    def reset(self) -> None:
        """Forgets earlier results and starts to listen to the detector."""
        self._gave_up = False
        self._counts = []
        self._data.start()

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Any) -> None:
        """Counts FLOPs while fewer than ``num_images`` images have been counted.

        Args:
            inputs: Detectron2's input dictionaries of one batch.
            outputs: the model's predictions; not used.
        """
        if not comm.is_main_process():
            return
        for image in inputs:
            if self._gave_up or len(self._counts) >= self._num_images:
                return
            self._count(image)

    def evaluate(self) -> OrderedDict[str, OrderedDict[str, float]] | None:
        """Sums up, logs a table and stops listening.

        Returns:
            ``{"flops": {...}}`` on the main process, else None. Keys: ``GFLOPs`` and ``parameters``
            (a number of elements) in total, ``GFLOPs-<stage>``, ``parameters-trainable``,
            and what depends on the images (see :class:`DataStatistics`); all means per image.
        """
        self._data.stop()
        gathered = comm.gather(self._data.statistics())
        if not comm.is_main_process():
            return None
        data = DataStatistics()
        for statistics in gathered:
            data.merge(statistics)
        parameters = count_parameters(self._model)
        logger.info(describe_cost(self._counts, parameters, data.means()))
        return OrderedDict(flops=_results(self._counts, parameters, data.means()))

    def _count(self, image: Mapping[str, Any]) -> None:
        # A counting pass repeats an image that was already seen.
        self._data.paused = True
        try:
            self._counts.append(count_flops(self._model, [image]))
        except Exception as error:  # whatever a tracer may raise must not cost the AP
            self._gave_up = True
            logger.warning(
                "GFLOPs will be missing from the results: %s could not be traced (%s: %s).",
                type(self._model).__name__,
                type(error).__name__,
                error,
            )
        finally:
            self._data.paused = False


def build_evaluators(
    evaluator: DatasetEvaluator, model: nn.Module, *, flops_images: int = 10
) -> DatasetEvaluators:
    """Puts a :class:`FlopsEvaluator` beside an accuracy evaluator.

    Args:
        evaluator: what the config's ``dataloader.evaluator`` builds, usually a ``COCOEvaluator``.
        model: the model that will be evaluated.
        flops_images: count FLOPs on this many images; 0 leaves parameters and token numbers only.
    """
    return DatasetEvaluators([evaluator, FlopsEvaluator(model, num_images=flops_images)])


def mean_stages(counts: Sequence[FlopCount]) -> OrderedDict[str, float]:
    """Mean multiply-adds per stage over several counts, in the order of the stages."""
    result: OrderedDict[str, float] = OrderedDict()
    for count in counts:
        for stage, value in count.stages.items():
            result[stage] = result.get(stage, 0.0) + value / len(counts)
    return result


def _results(
    counts: Sequence[FlopCount], parameters: ParameterCount, data: Mapping[str, float]
) -> OrderedDict[str, float]:
    result: OrderedDict[str, float] = OrderedDict()
    stages = mean_stages(counts)
    if counts:
        result["GFLOPs"] = sum(stages.values()) / GIGA
    result["parameters"] = float(parameters.total)
    result.update((f"GFLOPs-{stage}", value / GIGA) for stage, value in stages.items())
    result["parameters-trainable"] = float(parameters.trainable)
    result.update(data)
    return result


def describe_cost(
    counts: Sequence[FlopCount],
    parameters: ParameterCount,
    data: Mapping[str, float] | None = None,
) -> str:
    """A readable report: a table of stages, then what was measured and what was not.

    Args:
        counts: one count per measured image; may be empty.
        parameters: of the same model.
        data: what depends on the images, see :class:`DataStatistics`.
    """
    lines = [_stage_table(mean_stages(counts), parameters)]
    if counts:
        lines.append(f"GFLOPs (1 multiply-add = 1): {_measured_sizes(counts)}")
        lines.append(f"Operators seen, not counted: {_uncounted_operators(counts)}")
    if data:
        lines.append(f"Depends on the data (mean per image): {describe_data(data)}")
        lines += [PADDED_HEADS] if has_clusters(data) else []
    return "Cost of the model:\n" + "\n".join(lines)


def describe_data(data: Mapping[str, float]) -> str:
    """Numbers of tokens and clusters by name, see :class:`DataStatistics`, in one line."""
    return ", ".join(f"{name} {_short(value)}" for name, value in data.items())


def has_clusters(data: Mapping[str, float]) -> bool:
    """Whether tokens were clustered, so that `PADDED_HEADS` needs to be said."""
    return any("most-clusters-" in name for name in data)


def _short(value: float) -> str:
    """Shares to three digits, numbers to a tenth."""
    return f"{value:.3g}" if value < 1 else f"{value:.1f}"


def _stage_table(stages: Mapping[str, float], parameters: ParameterCount) -> str:
    total = sum(stages.values())
    names = list(dict.fromkeys([*stages, *parameters.stages]))
    rows: list[list[Any]] = []
    for name in names:
        flops, held = stages.get(name, 0.0), parameters.stages.get(name, 0)
        if flops or held:
            rows.append(_row(name, flops, total, held, parameters.trainable_stages.get(name, 0)))
    rows.append(_row("total", total, total, parameters.total, parameters.trainable))
    headers = ["stage", "GFLOPs", "share", "parameters (M)", "trainable (M)"]
    alignment = ("left", "right", "right", "right", "right")
    return tabulate(rows, headers, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def _row(name: str, flops: float, total: float, held: int, trainable: int) -> list[str]:
    share = f"{100 * flops / total:.1f} %" if total else "-"
    measured = f"{flops / GIGA:.2f}" if total else "-"
    return [name, measured, share, f"{held / MEGA:.3f}", f"{trainable / MEGA:.3f}"]


def _measured_sizes(counts: Sequence[FlopCount]) -> str:
    """Which image sizes the mean covers, the frequent ones by name."""
    sizes = Counter(size for count in counts for size in count.image_sizes)
    named = [f"{height}x{width} ({times})" for (height, width), times in sizes.most_common(5)]
    if len(sizes) > len(named):
        named.append(f"{len(sizes) - len(named)} more sizes")
    number = sum(sizes.values())
    return f"mean over {number} image{'s' * (number > 1)}, height x width {', '.join(named)}"


def _uncounted_operators(counts: Sequence[FlopCount]) -> str:
    """Names of the operators without a cost and how often they ran per measured image."""
    times: Counter[str] = Counter()
    for count in counts:
        times.update(count.uncounted)
    ordered = sorted((-number / len(counts), name) for name, number in times.items())
    described = [f"{name.removeprefix('aten::')} x{-number:g}" for number, name in ordered]
    return ", ".join(described) or "none"
