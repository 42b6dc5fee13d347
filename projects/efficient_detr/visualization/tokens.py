"""Which tokens the encoder keeps, drawn over the image.

Token selection (Focus-DETR, Sparse DETR) updates a part of the tokens in each layer. For each
level, every token is a cell of the image; a cell that no layer keeps is dark and grey, a kept one
is lit, in a colour that tells how many layers keep it. A second figure sets the kept tokens beside
the scores that chose them and the attention of the decoder, which the scores of Sparse DETR are to
foretell.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from efficient_detr.modeling.attention import DeformableDecoderAttention
from efficient_detr.structures import DetectorOutput, SpatialShapes, TokenSelection
from efficient_detr.visualization.figures import (
    FAINT,
    Image,
    enlarge,
    image_grid,
    save_figure,
    show_image,
)

__all__ = [
    "TokenExample",
    "collect_token_examples",
    "layers_keeping_tokens",
    "light_kept_tokens",
    "light_values",
    "save_token_maps",
    "save_tokens",
    "token_maps_figure",
    "tokens_figure",
]

LayerCounts = NDArray[np.int64]  # (H_l, W_l)
TokenValues = NDArray[np.float64]  # (H_l, W_l)


@dataclass(frozen=True)
class TokenExample:
    """An image and how many encoder layers keep each of its tokens.

    Attributes:
        image: network input without padding, RGB uint8 (height, width, 3).
        padded_size: (height, width) of the batch that the image was part of.
        layer_counts: for each level (H_l, W_l), how many layers keep a token, padding included.
        num_layers: number of encoder layers.
        scores: for each level (H_l, W_l), foreground probabilities from the token selection.
        attention: for each level (H_l, W_l), attention from all queries, heads and layers of the
            decoder; empty if its attention is not deformable.
    """

    image: Image
    padded_size: tuple[int, int]
    layer_counts: list[LayerCounts]
    num_layers: int
    scores: list[TokenValues] = field(default_factory=list)
    attention: list[TokenValues] = field(default_factory=list)


def layers_keeping_tokens(
    selection: TokenSelection, spatial_shapes: SpatialShapes, image_index: int
) -> list[LayerCounts]:
    """Count for every token of an image how many encoder layers keep it.

    Args:
        selection: the token selection of a batch.
        spatial_shapes: (H_l, W_l) of each level.
        image_index: which image of the batch.

    Returns:
        For each level an array (H_l, W_l) with values from 0 to the number of layers.
    """
    sizes = [height * width for height, width in spatial_shapes]
    counts = np.zeros(sum(sizes), dtype=np.int64)
    for layer, kept in enumerate(selection.kept_tokens()[:, image_index].tolist()):
        counts[selection.indices[layer][image_index, :kept].cpu().numpy()] += 1
    levels = np.split(counts, np.cumsum(sizes)[:-1])
    return [level.reshape(shape) for level, shape in zip(levels, spatial_shapes, strict=True)]


def light_kept_tokens(
    image: Image,
    layer_counts: LayerCounts,
    num_layers: int,
    padded_size: tuple[int, int],
    *,
    longer_side: int = 360,
) -> Image:
    """Light the kept tokens of one level and dim the others.

    Args:
        image: network input without padding, RGB uint8 (height, width, 3).
        layer_counts: (H_l, W_l) number of layers that keep a token, padding included.
        num_layers: number of encoder layers.
        padded_size: (height, width) of the batch that the image was part of.
        longer_side: longer side of the result, in pixels.

    Returns:
        RGB uint8; its longer side has `longer_side` pixels.
    """
    canvas = enlarge(image, longer_side).astype(np.float64)
    rows, columns = _cells_of(canvas, image, padded_size, layer_counts)
    counts = layer_counts[np.ix_(rows, columns)]
    colours = 255 * np.asarray(_layer_colours(num_layers).colors)[counts]
    grey = canvas.mean(axis=2, keepdims=True)
    kept = (counts > 0)[..., None]
    # The colour gives a kept cell its light even where the image is black.
    lit = np.where(kept, 0.65 * canvas + 0.35 * colours, 0.25 * grey)
    lit[_borders(rows)] *= 0.85
    lit[:, _borders(columns)] *= 0.85
    return np.clip(lit, 0, 255).astype(np.uint8)


def light_values(
    image: Image, values: TokenValues, padded_size: tuple[int, int], *, longer_side: int = 360
) -> Image:
    """Lay one value a token over the image, from dark blue for 0 to yellow for 1.

    Args:
        image: network input without padding, RGB uint8 (height, width, 3).
        values: (H_l, W_l) from 0 to 1, padding included.
        padded_size: (height, width) of the batch that the image was part of.
        longer_side: longer side of the result, in pixels.

    Returns:
        RGB uint8; its longer side has `longer_side` pixels.
    """
    canvas = enlarge(image, longer_side).astype(np.float64)
    rows, columns = _cells_of(canvas, image, padded_size, values)
    colours = 255 * colormaps["plasma"](values[np.ix_(rows, columns)])[..., :3]
    mixed = 0.3 * canvas.mean(axis=2, keepdims=True) + 0.7 * colours
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _cells_of(
    canvas: NDArray[Any], image: Image, padded_size: tuple[int, int], level: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each row and column of the enlarged image the token of the level it shows."""
    rows = _cells(canvas.shape[0], image.shape[0], padded_size[0], level.shape[0])
    columns = _cells(canvas.shape[1], image.shape[1], padded_size[1], level.shape[1])
    return rows, columns


def _cells(pixels: int, image_side: int, padded_side: int, tokens: int) -> NDArray[np.int64]:
    """Return for each of `pixels` along an enlarged image the token it belongs to, (pixels,)."""
    position = (np.arange(pixels) + 0.5) / pixels * image_side / padded_side
    return np.minimum((position * tokens).astype(np.int64), tokens - 1)


def _borders(cells: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return where a new cell begins, (pixels,)."""
    return np.diff(cells, prepend=cells[0]) != 0


def _layer_colours(num_layers: int) -> ListedColormap:
    """Return a colour for 0 to `num_layers` layers: dark grey, then ever brighter."""
    steps = colormaps["plasma"](np.linspace(0.35, 0.95, num_layers))[:, :3].tolist()
    return ListedColormap([(0.2, 0.2, 0.2), *(tuple(colour) for colour in steps)])


def tokens_figure(examples: Sequence[TokenExample]) -> Figure:
    """Make a figure with a row for each image: the image, then its tokens level by level.

    Args:
        examples: what to show, at least one; all from models with the same levels and layers.

    Returns:
        The figure.
    """
    levels, num_layers = len(examples[0].layer_counts), examples[0].num_layers
    title = "Tokens that the encoder updates"
    figure, axes = image_grid(len(examples), [1.0] * (1 + levels), title=title, footer=0.4)
    for row, example in zip(axes, examples, strict=True):
        show_image(row[0], enlarge(example.image, 360), title="image", note=" ")
        for level, (axis, counts) in enumerate(zip(row[1:], example.layer_counts, strict=True)):
            picture = light_kept_tokens(example.image, counts, num_layers, example.padded_size)
            show_image(axis, picture, title=f"level {level + 1}", note=_note(example, counts))
    _add_legend(figure, axes, num_layers)
    return figure


def token_maps_figure(examples: Sequence[TokenExample]) -> Figure:
    """Make a figure with up to three rows for each image: scores, attention and kept tokens.

    Args:
        examples: what to show, at least one; all from models with the same levels and layers.

    Returns:
        The figure.
    """
    parts = ["scores", "kept tokens"]
    if examples[0].attention:
        parts.insert(1, "attention of the decoder")
    levels, num_layers = len(examples[0].layer_counts), examples[0].num_layers
    title = "Scores, attention and choice of the tokens"
    figure, axes = image_grid(
        len(parts) * len(examples), [1.0] * (1 + levels), title=title, footer=0.4
    )
    grid = axes.reshape(len(examples), len(parts), 1 + levels)
    for example, rows in zip(examples, grid, strict=True):
        for part, row in zip(parts, rows, strict=True):
            show_image(row[0], enlarge(example.image, 360), title=part, note=" ")
            for level, (axis, (picture, note)) in enumerate(
                zip(row[1:], _maps(example, part), strict=True)
            ):
                show_image(axis, picture, title=f"level {level + 1}", note=note)
    _add_legend(figure, axes, num_layers)
    return figure


def _maps(example: TokenExample, part: str) -> list[tuple[Image, str]]:
    """Return picture and note of every level for one row of `token_maps_figure`."""
    image, padded_size = example.image, example.padded_size
    if part == "scores":
        return [
            (light_values(image, values, padded_size), f"up to {_seen(example, values).max():.2f}")
            for values in example.scores
        ]
    if part == "kept tokens":
        return [
            (
                light_kept_tokens(image, counts, example.num_layers, padded_size),
                _note(example, counts),
            )
            for counts in example.layer_counts
        ]
    seen = [_seen(example, values) for values in example.attention]
    total = max(sum(values.sum() for values in seen), np.finfo(np.float64).tiny)
    highest = max(max(values.max() for values in seen), np.finfo(np.float64).tiny)
    # Few tokens get most of the attention; the root makes the others visible.
    return [
        (
            light_values(image, np.sqrt(np.clip(values / highest, 0, 1)), padded_size),
            f"{level.sum() / total:.0%} of the attention",
        )
        for values, level in zip(example.attention, seen, strict=True)
    ]


def _note(example: TokenExample, counts: LayerCounts) -> str:
    """Return how many of the level's tokens, without padding, some layer keeps."""
    seen = _seen(example, counts)
    height, width = seen.shape
    return f"{int((seen > 0).sum())} of {height} x {width} tokens"


def _seen(example: TokenExample, level: NDArray[Any]) -> NDArray[Any]:
    """Return the part of a level (H_l, W_l) that is no padding."""
    sides = zip(example.image.shape, example.padded_size, level.shape, strict=False)
    height, width = (-(-side * tokens // padded) for side, padded, tokens in sides)
    return level[:height, :width]


def _add_legend(figure: Figure, axes: NDArray[Any], num_layers: int) -> None:
    """Add the colours of 0 to `num_layers` layers below the panels."""
    edges = np.arange(num_layers + 2) - 0.5
    norm = BoundaryNorm(edges.tolist(), num_layers + 1)
    mappable = ScalarMappable(norm, _layer_colours(num_layers))
    bar = figure.colorbar(
        mappable,
        ax=axes,
        location="bottom",
        shrink=0.5,
        aspect=40,
        pad=0.01,
        ticks=list(range(num_layers + 1)),
    )
    bar.ax.tick_params(labelsize=8, labelcolor=FAINT, length=0)
    bar.set_label("encoder layers that keep the token", fontsize=9, color=FAINT)


class _Recorder:
    """Forward hooks that keep what a detector's last call was given, attended to and returned."""

    def __init__(self) -> None:
        self.padded_size: tuple[int, int] = (0, 0)
        self.output: DetectorOutput | None = None
        self.attention: Tensor | None = None

    def watch(self, detector: nn.Module) -> list[RemovableHandle]:
        """Hook into a detector and into its deformable cross-attention."""
        handles = [detector.register_forward_hook(self.keep_output, with_kwargs=True)]
        for module in detector.modules():
            if isinstance(module, DeformableDecoderAttention):
                handles.append(module.register_forward_pre_hook(self.add_attention))
        return handles

    def keep_output(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of the detector."""
        images = args[0] if args else kwargs["images"]
        self.padded_size = (int(images.shape[-2]), int(images.shape[-1]))
        self.output = output

    def add_attention(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a cross-attention, called with its arguments by position."""
        attention = cast(DeformableDecoderAttention, module).token_attention(*args[:4])
        self.attention = attention if self.attention is None else self.attention + attention


@torch.no_grad()
def collect_token_examples(
    model: nn.Module, batched_inputs: Sequence[Mapping[str, Any]]
) -> list[TokenExample]:
    """Run a model and return which tokens its encoder keeps, and what speaks for them.

    Args:
        model: an `EfficientDETR`; its mode (training or evaluation) is restored.
        batched_inputs: Detectron2's dicts with `image`, uint8 (3, height, width).

    Returns:
        One example per image, or none if the model updates every token.
    """
    recorder = _Recorder()
    handles = recorder.watch(model.get_submodule("detector"))
    training = model.training
    try:
        model.eval()(list(batched_inputs))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    output, attention = recorder.output, recorder.attention
    if output is None or output.selection is None:
        return []
    shapes, scores = output.memory.spatial_shapes, output.selection.scores.sigmoid()
    return [
        TokenExample(
            image=rgb_image(inputs["image"], str(getattr(model, "input_format", "RGB"))),
            padded_size=recorder.padded_size,
            layer_counts=layers_keeping_tokens(output.selection, shapes, index),
            num_layers=len(output.selection.indices),
            scores=_levels(scores[index], shapes),
            attention=[] if attention is None else _levels(attention[index], shapes),
        )
        for index, inputs in enumerate(batched_inputs)
    ]


def _levels(values: Tensor, spatial_shapes: SpatialShapes) -> list[TokenValues]:
    """Return the values (S,) of the tokens of an image as one array (H_l, W_l) for each level."""
    levels = values.double().cpu().split([height * width for height, width in spatial_shapes])
    return [
        level.reshape(shape).numpy() for level, shape in zip(levels, spatial_shapes, strict=True)
    ]


def rgb_image(image: torch.Tensor, input_format: str) -> Image:
    """Return a network input (3, height, width) as RGB uint8 (height, width, 3)."""
    array = image.cpu().numpy().astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(array[..., ::-1] if input_format == "BGR" else array)


def save_tokens(examples: Sequence[TokenExample], path: str | os.PathLike[str]) -> Path:
    """Write the picture of the kept tokens as PNG; returns the path."""
    return save_figure(tokens_figure(examples), path)


def save_token_maps(examples: Sequence[TokenExample], path: str | os.PathLike[str]) -> Path:
    """Write the picture of scores, attention and kept tokens as PNG; returns the path."""
    return save_figure(token_maps_figure(examples), path)
