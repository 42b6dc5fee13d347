"""Clusters of an encoder layer's queries, drawn over the image; and curves to choose hashing by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from efficient_detr.errors import UserError
from efficient_detr.evaluation.clusters import (
    ClusterMeasurement,
    EncoderInput,
    encoder_attentions,
)
from efficient_detr.modeling.attention.clustered import exact_attention
from efficient_detr.modeling.attention.token_clustering import hashed_queries
from efficient_detr.visualization.figures import (
    FAINT,
    INK,
    Image,
    class_colours,
    enlarge,
    image_grid,
    save_figure,
    show_image,
)

__all__ = [
    "ClusterExample",
    "ClusterRecorder",
    "cluster_curves_figure",
    "clusters_figure",
    "draw_clusters",
    "save_cluster_curves",
    "save_clusters",
]

ClusterIds = NDArray[np.int64]  # (H_l, W_l)


@dataclass(frozen=True)
class ClusterExample:
    """An image and the clusters of its tokens in one head of one layer.

    Attributes:
        image: RGB uint8 (height, width, 3).
        ids: (H_l, W_l) cluster of each token that lies on the image.
        layer: index of the encoder layer.
        head: index of the head.
    """

    image: Image
    ids: ClusterIds
    layer: int
    head: int


class ClusterRecorder:
    """Context manager that records the clusters of the next images a model sees, one at a time.

    Clusters are those of the attention's own `query_clustering`; attention is dense meanwhile.

    Args:
        model: a model with clustered attention in the encoder.
        layer: index of the encoder layer.
        head: index of the head.
        level: of a model with several feature levels, which to draw.

    Raises:
        UserError: if there is no such layer, head or query clustering.
    """

    def __init__(self, model: nn.Module, layer: int, head: int, level: int = 0) -> None:
        attentions = encoder_attentions(model)
        if not 0 <= layer < len(attentions):
            raise UserError(
                f"There is no layer {layer}: clustered layers are 0 to {len(attentions) - 1}."
            )
        self.attention = attentions[layer]
        if not 0 <= head < self.attention.num_heads:
            raise UserError(
                f"There is no head {head}: heads are 0 to {self.attention.num_heads - 1}."
            )
        clustering = self.attention.query_clustering
        if clustering is None:
            raise UserError(f"Layer {layer} clusters keys only, and only queries can be drawn.")
        self.clustering = clustering
        self.model, self.layer, self.head, self.level = model, layer, head, level
        self.ids: ClusterIds | None = None

    def __enter__(self) -> ClusterRecorder:
        self._exact = exact_attention(self.model)
        self._exact.__enter__()
        self._handle = self.attention.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handle.remove()
        self._exact.__exit__(*exception)

    def example(self, image: Image) -> ClusterExample:
        """The clusters of the last image that the model saw.

        Raises:
            UserError: if it saw none, or updates a selection of the tokens only.
        """
        if self.ids is None:
            raise UserError("No clusters to draw: the layer must update every token of an image.")
        return ClusterExample(image, self.ids, self.layer, self.head)

    @torch.no_grad()
    def _record(self, attention: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        call = EncoderInput.of_call(attention, args, kwargs)
        shape = call.memory.spatial_shapes[self.level]
        if call.padding_mask.shape != call.memory.padding_mask.shape:
            self.ids = None
            return
        assigned = self.clustering(hashed_queries(call.heads[0]), call.padding_mask)
        of_level = call.memory.split(assigned.ids[:, self.head])[self.level][0]
        padding = call.memory.split(call.padding_mask)[self.level][0]
        visible = ~padding.unflatten(0, shape).cpu().numpy()
        rows, columns = visible.any(1), visible.any(0)
        self.ids = of_level.unflatten(0, shape).cpu().numpy()[np.ix_(rows, columns)]


def draw_clusters(image: Image, ids: ClusterIds, *, longer_side: int = 480) -> Image:
    """Colour tokens by cluster; those that are alone in theirs stay grey.

    Args:
        image: RGB uint8 (height, width, 3).
        ids: (H_l, W_l) clusters; the cells cover the image.
        longer_side: longer side of the result, in pixels.

    Returns:
        RGB uint8; its longer side has `longer_side` pixels.
    """
    canvas = enlarge(image, longer_side).astype(np.float64)
    grey = canvas.mean(axis=2, keepdims=True)
    size = (canvas.shape[1], canvas.shape[0])
    ranks = cv2.resize(_ranks(ids), size, interpolation=cv2.INTER_NEAREST).astype(np.int64)
    # The largest clusters come first and get the colours that differ most.
    palette = 255 * np.asarray(class_colours(int(ranks.max(initial=-1)) + 2))
    shared = (ranks >= 0)[..., None]
    drawn = np.where(shared, 0.45 * grey + 0.55 * palette[ranks], 0.4 * grey)
    return np.clip(drawn, 0, 255).astype(np.uint8)


def _ranks(ids: ClusterIds) -> NDArray[np.float32]:
    """(H_l, W_l): 0 for tokens of the largest cluster, 1 for the next; -1 for single tokens."""
    clusters, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(len(clusters), dtype=np.float32)
    ranks[order] = np.arange(len(clusters))
    ranks[counts == 1] = -1
    return ranks[inverse].reshape(ids.shape)


def clusters_figure(examples: Sequence[ClusterExample]) -> Figure:
    """Make a figure with a row for each example: the image, then its clusters.

    Args:
        examples: what to show, at least one.

    Returns:
        The figure.
    """
    figure, axes = image_grid(
        len(examples), [1.0, 1.0], title="Clusters of queries", cell=(3.6, 3.4)
    )
    for row, example in zip(axes, examples, strict=True):
        counts = np.unique(example.ids, return_counts=True)[1]
        alone = int((counts == 1).sum())
        note = f"{len(counts)} clusters of {example.ids.size} tokens, {alone} of one token (grey)"
        show_image(row[0], enlarge(example.image, 480), title="image", note=" ")
        title = f"layer {example.layer}, head {example.head}"
        show_image(row[1], draw_clusters(example.image, example.ids), title=title, note=note)
    return figure


def save_clusters(examples: Sequence[ClusterExample], path: str | os.PathLike[str]) -> Path:
    """Write the picture of clusters as PNG; returns the path."""
    return save_figure(clusters_figure(examples), path)


def cluster_curves_figure(measurements: Sequence[ClusterMeasurement]) -> Figure:
    """Make a figure of clusters per token and of the error by rounds of hashing.

    Args:
        measurements: of any layers, images and hashings; a line is the mean over layers and images
            for one width and bias range.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(9, 3.6), facecolor="white", layout="constrained")
    ratio, error = figure.subplots(1, 2)
    _plot(ratio, measurements, "ratio", "Clusters per token, C / N")
    _plot(error, measurements, "error", "Relative error of the attention")
    ratio.set_ylim(0, 1.02)
    error.set_ylim(bottom=0)
    ratio.legend(fontsize=8, frameon=False)
    return figure


def _plot(axis: Axes, measurements: Sequence[ClusterMeasurement], name: str, title: str) -> None:
    """Plot one number by rounds, a line for each width and bias range."""
    axis.set_title(title, fontsize=10, color=INK, fontweight="bold")
    axis.set_xlabel("rounds of hashing", fontsize=9, color=FAINT)
    axis.tick_params(labelsize=8, colors=FAINT)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    lines: dict[tuple[float, float], dict[int, list[float]]] = {}
    for one in measurements:
        line = lines.setdefault((one.hashing.width, one.hashing.bias_range), {})
        line.setdefault(one.hashing.rounds, []).append(getattr(one, name))
    for (width, bias_range), values in sorted(lines.items()):
        rounds = sorted(values)
        means = [float(np.mean(values[each])) for each in rounds]
        label = f"width {width:g}, bias up to {bias_range:g}"
        axis.plot(rounds, means, marker="o", markersize=4, linewidth=1.6, label=label)


def save_cluster_curves(
    measurements: Sequence[ClusterMeasurement], path: str | os.PathLike[str]
) -> Path:
    """Write the curves as PNG; returns the path."""
    return save_figure(cluster_curves_figure(measurements), path)
