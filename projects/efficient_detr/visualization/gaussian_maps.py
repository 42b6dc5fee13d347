"""Where the queries of SMCA look: their Gaussians and their attention, drawn over the image.

For each query there are two rows, with a panel for each head: the Gaussian of the head, and below
it the attention that comes out when the Gaussian has been added to the logits. Crosses mark the
centres. With several levels the one with the largest share of the attention is shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor, nn

from efficient_detr.boxes import cxcywh_to_xyxy
from efficient_detr.errors import UserError
from efficient_detr.modeling.attention.spatially_modulated import ModulatedAttention
from efficient_detr.structures import DetectorOutput, FeatureTokens
from efficient_detr.visualization.figures import (
    Image,
    class_colours,
    enlarge,
    image_grid,
    save_figure,
    show_image,
)
from efficient_detr.visualization.tokens import light_values, rgb_image

__all__ = [
    "GaussianExample",
    "collect_gaussian_examples",
    "gaussian_maps_figure",
    "save_gaussian_maps",
]

_LONGER_SIDE = 360


@dataclass(frozen=True)
class GaussianExample:
    """One query of a decoder layer on one image.

    Attributes:
        image: network input without padding, RGB uint8 (height, width, 3).
        padded_size: (height, width) of the batch that the image was part of.
        query: index of the query.
        level: index of the level that is shown.
        share: share of that level in the attention, 0 to 1.
        box: (4,) predicted box (x0, y0, x1, y1) in pixels of the image.
        centers: (H, 2) centres (x, y) in pixels of the image, in the middle of their cells.
        gaussians: (H, H_l, W_l) values of the Gaussians, 0 to 1, padding included.
        attention: (H, H_l, W_l) attention weights, padding included.
    """

    image: Image
    padded_size: tuple[int, int]
    query: int
    level: int
    share: float
    box: NDArray[np.float64]
    centers: NDArray[np.float64]
    gaussians: NDArray[np.float64]
    attention: NDArray[np.float64]


class _Recorder:
    """Forward hooks that keep the last call of a detector and of one of its attentions."""

    def __init__(self) -> None:
        self.padded_size: tuple[int, int] = (0, 0)
        self.output: DetectorOutput | None = None
        self.arguments: tuple[Any, ...] = ()

    def keep_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the detector."""
        self.padded_size = (int(args[0].shape[-2]), int(args[0].shape[-1]))
        self.output = output

    def keep_arguments(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the attention."""
        self.arguments = args


@torch.no_grad()
def collect_gaussian_examples(
    model: nn.Module,
    batched_inputs: Sequence[Mapping[str, Any]],
    *,
    queries: Sequence[int] | None = None,
    layer: int = -1,
) -> list[GaussianExample]:
    """Run a model and return where some of its queries look.

    Args:
        model: an `EfficientDETR` with modulated attention; its mode (training or evaluation) is
            restored.
        batched_inputs: Detectron2's dicts with `image`, uint8 (3, height, width).
        queries: indices of the queries, for all images; None for the two with the highest score.
        layer: index of the decoder layer; negative from the last.

    Returns:
        An example for each image and query, image after image.

    Raises:
        UserError: if the model has no such layer or query, or no modulated attention.
    """
    attention = _attention_of(model, layer)
    recorder, training = _Recorder(), model.training
    handles = [
        attention.register_forward_pre_hook(recorder.keep_arguments),
        model.get_submodule("detector").register_forward_hook(recorder.keep_output),
    ]
    try:
        model.eval()(list(batched_inputs))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    assert recorder.output is not None
    input_format = str(getattr(model, "input_format", "RGB"))
    images = [rgb_image(inputs["image"], input_format) for inputs in batched_inputs]
    return _examples(attention, recorder, recorder.output.decoder.layer(layer), images, queries)


def _attention_of(model: nn.Module, layer: int) -> ModulatedAttention:
    layers = list(model.get_submodule("detector.decoder.layers").children())
    if not -len(layers) <= layer < len(layers):
        raise UserError(f"There is no decoder layer {layer}: layers are 0 to {len(layers) - 1}.")
    attention = layers[layer].get_submodule("cross_attention")
    if not isinstance(attention, ModulatedAttention):
        raise UserError(
            f"decoder.layers.{layer} has {type(attention).__name__}, which has no Gaussians: "
            "choose a model with SpatiallyModulatedAttention or ScaleSelectiveModulatedAttention."
        )
    return attention


def _examples(
    attention: ModulatedAttention,
    recorder: _Recorder,
    prediction: Any,
    images: list[Image],
    queries: Sequence[int] | None,
) -> list[GaussianExample]:
    _, _, references, memory, layer_input = recorder.arguments
    weights = attention.attention_weights(*recorder.arguments)
    gaussians = attention.log_gaussian(layer_input, references, memory).exp()
    centers = attention.centers(layer_input, references, memory)
    shares = attention.level_weights(layer_input)
    examples = []
    for index, image in enumerate(images):
        for query in _chosen(prediction.logits[index], queries):
            level = int(shares[index, query].argmax())
            # Cells count from 0 at their middle.
            points = (centers[index, level, :, query] + 0.5) * attention.strides[level]
            examples.append(
                GaussianExample(
                    image=image,
                    padded_size=recorder.padded_size,
                    query=query,
                    level=level,
                    share=float(shares[index, query, level]),
                    box=_corners(prediction.boxes[index, query], image),
                    centers=points.double().cpu().numpy(),
                    gaussians=_level_maps(gaussians[index, :, query], memory, level),
                    attention=_level_maps(weights[index, :, query], memory, level),
                )
            )
    return examples


def _chosen(logits: Tensor, queries: Sequence[int] | None) -> list[int]:
    """Indices of queries to show, given their logits (Q, K)."""
    if queries is None:
        return logits.amax(-1).topk(min(2, len(logits))).indices.tolist()
    wrong = [query for query in queries if not 0 <= query < len(logits)]
    if wrong:
        raise UserError(f"There is no query {wrong[0]}: queries are 0 to {len(logits) - 1}.")
    return list(queries)


def _corners(box: Tensor, image: Image) -> NDArray[np.float64]:
    """(x0, y0, x1, y1) in pixels from a box (cx, cy, w, h) in [0, 1]."""
    height, width = image.shape[:2]
    return cxcywh_to_xyxy(box.double().cpu()).numpy() * (width, height, width, height)


def _level_maps(values: Tensor, memory: FeatureTokens, level: int) -> NDArray[np.float64]:
    """(H, H_l, W_l) of values (H, S)."""
    of_level = values.split(memory.level_sizes, dim=-1)[level]
    return of_level.unflatten(-1, memory.spatial_shapes[level]).double().cpu().numpy()


def gaussian_maps_figure(examples: Sequence[GaussianExample]) -> Figure:
    """Make a figure with two rows for each example: Gaussians, then attention, head by head.

    Args:
        examples: what to show, at least one; all with the same number of heads.

    Returns:
        The figure.
    """
    heads = len(examples[0].centers)
    figure, axes = image_grid(
        2 * len(examples), [1.0] * (1 + heads), title="Where queries look", cell=(1.7, 1.9)
    )
    colours = class_colours(heads)
    for example, rows in zip(examples, axes.reshape(len(examples), 2, -1), strict=True):
        _show_query(rows[0, 0], example)
        for head in range(heads):
            peak = max(float(example.attention[head].max()), np.finfo(np.float64).tiny)
            # Few cells get most of the attention; the root makes the others visible.
            maps = {
                f"Gaussian, head {head}": example.gaussians[head],
                f"attention, head {head}": np.sqrt(example.attention[head] / peak),
            }
            for axis, (title, values) in zip(rows[:, 1 + head], maps.items(), strict=True):
                picture = light_values(
                    example.image, values, example.padded_size, longer_side=_LONGER_SIDE
                )
                show_image(axis, picture, title=title)
                _mark(axis, example, [head], [colours[head]])
    return figure


def _show_query(axis: Axes, example: GaussianExample) -> None:
    """Show the image with the predicted box and the centres of all heads."""
    note = f"level {example.level + 1}: {example.share:.0%}"
    picture = enlarge(example.image, _LONGER_SIDE)
    show_image(axis, picture, title=f"query {example.query}", note=note)
    x0, y0, x1, y1 = example.box * _enlargement(example)
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white", linewidth=1.2))
    heads = list(range(len(example.centers)))
    _mark(axis, example, heads, class_colours(len(heads)))


def _mark(axis: Axes, example: GaussianExample, heads: list[int], colours: Sequence[Any]) -> None:
    """Mark the centres of some heads, where they lie inside the picture."""
    for head, colour in zip(heads, colours, strict=True):
        x, y = example.centers[head] * _enlargement(example)
        for under, width in (("black", 3.6), (colour, 1.8)):
            axis.plot(
                [x],
                [y],
                "+",
                color=under,
                ms=9,
                mew=width,
                clip_on=True,
                scalex=False,
                scaley=False,
            )


def _enlargement(example: GaussianExample) -> float:
    return _LONGER_SIDE / max(example.image.shape[:2])


def save_gaussian_maps(examples: Sequence[GaussianExample], path: str | os.PathLike[str]) -> Path:
    """Write the picture of Gaussians and attention as PNG; returns the path."""
    return save_figure(gaussian_maps_figure(examples), path)
