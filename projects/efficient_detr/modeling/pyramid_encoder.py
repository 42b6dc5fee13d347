"""The convolutional encoder of SMCA's released multi-scale model: a pyramid that talks both ways.

No layer of it attends. Each level is mixed by a depthwise convolution and gets what its finer and
its coarser neighbour send. The published code ("new multi scale", 44.4 AP) is its only description;
the paper has attention here. Padding is not masked in the convolutions, as the published weights
expect, so cells at its border see what the batch padded the image with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.structures import EncoderOutput, FeatureTokens, SpatialShapes, TokenSelection


def depthwise_convolution(channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution of each channel by itself that keeps the size, but for its stride."""
    if kernel_size % 2 == 0:
        raise ConfigError(f"kernel_size={kernel_size} must be odd, to keep maps in place")
    convolution = nn.Conv2d(
        channels, channels, kernel_size, stride, padding=kernel_size // 2, groups=channels
    )
    nn.init.xavier_uniform_(convolution.weight)
    return convolution


def pointwise_convolution(channels: int) -> nn.Conv2d:
    """A 1x1 convolution with Xavier-uniform weight."""
    convolution = nn.Conv2d(channels, channels, 1)
    nn.init.xavier_uniform_(convolution.weight)
    return convolution


class CrossScaleExchange(nn.Module):
    """Each level gets a map from its finer and one from its coarser neighbour.

    Downwards, a depthwise convolution of stride 2 brings a map to the grid of the next level;
    upwards, a depthwise convolution is followed by bilinear interpolation.

    Args:
        channels: C.
        num_levels: L, at least 2.
        kernel_size: side of the convolutions, odd.
    """

    def __init__(self, *, channels: int, num_levels: int, kernel_size: int) -> None:
        super().__init__()
        if num_levels < 2:
            raise ConfigError(
                f"{type(self).__name__} needs at least 2 levels, not {num_levels}: raise "
                "neck.num_levels or use a TransformerEncoder"
            )
        self.num_levels = num_levels

    def to_coarser(self, pair: int) -> nn.Module:
        """What sends level `pair` to the grid of level `pair` + 1."""
        raise NotImplementedError(f"{type(self).__name__} does not define to_coarser")

    def to_finer(self, pair: int) -> nn.Module:
        """What is applied to level `pair` + 1 before it is interpolated to level `pair`."""
        raise NotImplementedError(f"{type(self).__name__} does not define to_finer")

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Add to each map (B, C, H_l, W_l) what its neighbours send.

        Raises:
            ConfigError: if a level is not half as large as the one before, rounded up.
        """
        mixed = list(maps)
        for pair, (fine, coarse) in enumerate(zip(maps[:-1], maps[1:], strict=True)):
            down = self.to_coarser(pair)(fine)
            _check_halved(fine, coarse, down)
            up = F.interpolate(
                self.to_finer(pair)(coarse), fine.shape[-2:], mode="bilinear", align_corners=True
            )
            mixed[pair] = mixed[pair] + up
            mixed[pair + 1] = mixed[pair + 1] + down
        return mixed


class SeparateExchange(CrossScaleExchange):
    """Every pair of neighbouring levels has convolutions of its own; see `CrossScaleExchange`."""

    def __init__(self, *, channels: int, num_levels: int, kernel_size: int) -> None:
        super().__init__(channels=channels, num_levels=num_levels, kernel_size=kernel_size)
        pairs = range(num_levels - 1)
        self.down = nn.ModuleList(depthwise_convolution(channels, kernel_size, 2) for _ in pairs)
        self.up = nn.ModuleList(depthwise_convolution(channels, kernel_size) for _ in pairs)

    def to_coarser(self, pair: int) -> nn.Module:
        """The convolution of the pair."""
        return self.down[pair]

    def to_finer(self, pair: int) -> nn.Module:
        """The convolution of the pair."""
        return self.up[pair]


class SharedExchange(CrossScaleExchange):
    """One convolution down and one up serve all pairs of levels; see `CrossScaleExchange`."""

    def __init__(self, *, channels: int, num_levels: int, kernel_size: int) -> None:
        super().__init__(channels=channels, num_levels=num_levels, kernel_size=kernel_size)
        self.down = depthwise_convolution(channels, kernel_size, 2)
        self.up = depthwise_convolution(channels, kernel_size)

    def to_coarser(self, pair: int) -> nn.Module:
        """The only convolution."""
        return self.down

    def to_finer(self, pair: int) -> nn.Module:
        """The only convolution."""
        return self.up


class PyramidEncoderLayer(nn.Module):
    """Convolutions inside and between levels, then a feed-forward network, with post-norm.

    Norms, feed-forward network and 1x1 convolutions are the same for all levels.

    Args:
        exchange: convolutions between levels.
        feedforward: the position-wise network.
        channels: C.
        num_levels: L.
        kernel_size: side of the depthwise convolution inside each level, odd.
        dropout: probability on both branches before the residual.
    """

    def __init__(
        self,
        *,
        exchange: CrossScaleExchange,
        feedforward: FeedForward,
        channels: int,
        num_levels: int,
        kernel_size: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.input_projection = pointwise_convolution(channels)
        self.level_convolutions = nn.ModuleList(
            depthwise_convolution(channels, kernel_size) for _ in range(num_levels)
        )
        self.exchange = exchange
        self.output_projection = pointwise_convolution(channels)
        self.convolution_norm = nn.LayerNorm(channels)
        self.feedforward = feedforward
        self.feedforward_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: FeatureTokens) -> Tensor:
        """Update the features (B, S, C) of all tokens."""
        features = tokens.features
        mixed = self.mix(features + tokens.positions, tokens.spatial_shapes)
        features = self.convolution_norm(features + self.dropout(mixed))
        return self.feedforward_norm(features + self.dropout(self.feedforward(features)))

    def mix(self, located: Tensor, shapes: SpatialShapes) -> Tensor:
        """The convolutions: features (B, S, C) with positions to (B, S, C)."""
        sizes = [height * width for height, width in shapes]
        # All levels as one map that is a single cell wide, which 1x1 convolutions cannot tell.
        projected = self.input_projection(located.transpose(1, 2).unsqueeze(-1)).squeeze(-1)
        maps = [
            convolve(level.unflatten(2, shape))
            for convolve, level, shape in zip(
                self.level_convolutions, projected.split(sizes, dim=2), shapes, strict=True
            )
        ]
        mixed = torch.cat([level.flatten(2) for level in self.exchange(maps)], dim=2)
        return self.output_projection(mixed.unsqueeze(-1)).squeeze(-1).transpose(1, 2)


class PyramidEncoder(nn.Module):
    """Layers over all levels, then a memory whose finest level is halved.

    The decoder would spend most of its time on the finest level. A convolution of stride 2 brings
    that level to the grid of the next one, whose positions and padding its cells take over: the
    memory has L levels, the first two of one size.

    Args:
        layers: the layers, in order.
        channels: C.
        num_levels: L, at least 2.
    """

    def __init__(
        self, *, layers: Sequence[PyramidEncoderLayer], channels: int, num_levels: int
    ) -> None:
        super().__init__()
        if num_levels < 2:
            raise ConfigError(
                f"PyramidEncoder needs at least 2 levels, not {num_levels}: raise neck.num_levels "
                "or use a TransformerEncoder"
            )
        self.num_levels = num_levels
        self.layers = nn.ModuleList(layers)
        self.reduction = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        nn.init.xavier_uniform_(self.reduction.weight)

    def forward(
        self,
        tokens: FeatureTokens,
        selection: TokenSelection | None = None,
        head: PredictionHead | None = None,
    ) -> EncoderOutput:
        """Refine the tokens of all levels.

        Args:
            tokens: the tokens from the neck, each level half as large as the one before.
            selection: None; convolutions update every cell.
            head: not used.

        Raises:
            ConfigError: if there is a selection, or a level has another size.
        """
        if selection is not None:
            raise ConfigError(
                "PyramidEncoder updates all tokens and takes no selection: set "
                "detector.selection=None, or use a TransformerEncoder"
            )
        for layer in self.layers:
            tokens = tokens.with_features(cast(PyramidEncoderLayer, layer)(tokens))
        return EncoderOutput(self.reduce_finest_level(tokens))

    def reduce_finest_level(self, tokens: FeatureTokens) -> FeatureTokens:
        """The memory: the first level on the grid of the second one, the others as they are."""
        reduced = self.reduction(tokens.level(0))
        _check_halved(tokens.level(0), tokens.level(1), reduced)
        levels = [1, *range(1, len(tokens.spatial_shapes))]
        features = [reduced.flatten(2).transpose(1, 2), *tokens.split()[1:]]
        return dataclasses.replace(
            tokens,
            features=torch.cat(features, dim=1),
            positions=_pick_levels(tokens, tokens.positions, levels),
            padding_mask=_pick_levels(tokens, tokens.padding_mask, levels),
            spatial_shapes=[tokens.spatial_shapes[level] for level in levels],
            valid_ratios=tokens.valid_ratios[:, levels],
            reference_points=_pick_levels(tokens, tokens.reference_points, levels)[:, :, levels],
        )


def _pick_levels(tokens: FeatureTokens, tensor: Tensor, levels: list[int]) -> Tensor:
    """Rows of a (B, S, ...) tensor that belong to `levels`, in that order."""
    parts = tokens.split(tensor)
    return torch.cat([parts[level] for level in levels], dim=1)


def _check_halved(fine: Tensor, coarse: Tensor, halved: Tensor) -> None:
    if halved.shape[-2:] != coarse.shape[-2:]:
        raise ConfigError(
            f"PyramidEncoder needs levels of half the size of the one before, rounded up; after "
            f"{tuple(fine.shape[-2:])} came {tuple(coarse.shape[-2:])} instead of "
            f"{tuple(halved.shape[-2:])}: use neck levels of strides 8, 16, 32, 64"
        )
