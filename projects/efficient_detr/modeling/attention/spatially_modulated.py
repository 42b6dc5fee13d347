"""Spatially modulated co-attention: queries look around a predicted centre (SMCA).

Each head of each query has a Gaussian over the cells of a level. Its logarithm is added to the
attention logits before the softmax. With cells n at integer indices (x_n, y_n), head centres c and
squared scales s it is, on a level with distance factor f,

    G(n) = -(f / beta) (s_x (c_x - x_n)^2 + s_y (c_y - y_n)^2)

which is a sum of a part for each column and one for each row. So only (B, H, Q, W_l) and
(B, H, Q, H_l) are computed, padding is merged into them, and one broadcast addition makes the bias
of the attention. docs/smca.md compares this with other formulations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention.dense import MultiHeadAttention
from efficient_detr.modeling.attention.gaussian_scale import GaussianScale
from efficient_detr.modeling.attention.interface import DecoderAttention
from efficient_detr.modeling.layers import MLP, xavier_linear
from efficient_detr.structures import FeatureTokens


class CenterPrediction(MLP):
    """Predicts where a query looks from the query alone: three linear layers, two outputs.

    Args:
        channels: C.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__(sizes=[channels, channels, channels, 2])
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


class ModulatedAttention(MultiHeadAttention, DecoderAttention):
    """What attention under Gaussians has in common on one level and on several.

    Centres and scales depend on the layer's input, before self-attention. The centre of a query is
    its reference point; each head and level adds an offset in cells, without bound.

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: H.
        dropout: probability on the attention weights.
        scale: kind of the Gaussians' widths, for the same heads and levels.
        strides: pixels a cell of each level of the memory, L numbers above 0.
        distance_factors: factor on squared distances for each level, L numbers above 0.
        beta: divides squared distances, above 0; the larger, the wider all Gaussians.
        center_prediction: predicts reference points for queries that have none; the decoder asks
            its first layer only. None: the queries bring references.

    Raises:
        ConfigError: if the arguments do not fit together.
    """

    needs_references = True

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int,
        dropout: float,
        scale: GaussianScale,
        strides: Sequence[float],
        distance_factors: Sequence[float],
        beta: float,
        center_prediction: MLP | None,
    ) -> None:
        super().__init__(channels=channels, num_heads=num_heads, dropout=dropout)
        self.strides = [float(stride) for stride in strides]
        self.distance_factors = [float(factor) for factor in distance_factors]
        self.beta = beta
        self.num_levels = len(self.strides)
        self.norm = nn.LayerNorm(channels)
        self.head_offsets = xavier_linear(channels, self.num_levels * num_heads * 2)
        self.scale = scale
        self.center_prediction = center_prediction
        self._check()

    def _check(self) -> None:
        name = type(self).__name__
        if len(self.distance_factors) != self.num_levels:
            raise ConfigError(
                f"{name} has {len(self.distance_factors)} distance_factors for "
                f"{self.num_levels} strides: give one of each for each level"
            )
        if min(self.beta, *self.strides, *self.distance_factors) <= 0:
            raise ConfigError(
                f"{name} needs numbers above 0: strides={self.strides}, "
                f"distance_factors={self.distance_factors}, beta={self.beta}"
            )
        for size in ("num_heads", "num_levels"):
            if getattr(self.scale, size) != getattr(self, size):
                raise ConfigError(
                    f"{name} has {size}={getattr(self, size)}, but its scale "
                    f"{type(self.scale).__name__} has {size}={getattr(self.scale, size)}: "
                    "set them to the same number"
                )
        if self.center_prediction is not None and self.center_prediction.output.out_features != 2:
            raise ConfigError(f"center_prediction of {name} must end in 2 features (x, y)")

    @property
    def predicts_references(self) -> bool:
        """Whether there is a centre prediction."""
        return self.center_prediction is not None

    def predict_reference_logits(self, layer_input: Tensor) -> Tensor | None:
        """Centres (B, Q, 2) before the sigmoid, or None without a centre prediction."""
        if self.center_prediction is None:
            return None
        with full_precision(layer_input):
            return self.center_prediction(self._normalise(layer_input))

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_boxes: Tensor | None,
        memory: FeatureTokens,
        layer_input: Tensor,
    ) -> Tensor:
        """Attend from queries (B, Q, C) to `memory`; returns (B, Q, C).

        Padding must be whole columns and rows of a level, as it is at the right and bottom of
        images in a batch.
        """
        heads, keys, values = self._project_levels(query, position, memory)
        biases = self._biases(layer_input, reference_boxes, memory)
        attended = [
            self.attend_heads(heads, key, value, bias.to(heads.dtype))
            for key, value, bias in zip(keys, values, biases, strict=True)
        ]
        return self.merge(self.mix_levels(attended, layer_input))

    def mix_levels(self, attended: list[Tensor], layer_input: Tensor) -> Tensor:
        """One (B, H, Q, D) from what the queries got from each level."""
        raise NotImplementedError(f"{type(self).__name__} does not define mix_levels")

    def level_weights(self, layer_input: Tensor) -> Tensor:
        """(B, Q, L) share of each level in the attention; the shares of a query sum to 1."""
        raise NotImplementedError(f"{type(self).__name__} does not define level_weights")

    def centers(
        self, layer_input: Tensor, reference_boxes: Tensor | None, memory: FeatureTokens
    ) -> Tensor:
        """(B, L, H, Q, 2) centres (x, y) of the Gaussians, in cells of each level.

        Args:
            layer_input: (B, Q, C) queries with positions as they were before self-attention.
            reference_boxes: (B, Q, 4) boxes or (B, Q, 2) points in [0, 1] of the unpadded image.
            memory: the tokens attended to.

        Raises:
            ConfigError: if there are no references.
        """
        if reference_boxes is None:
            raise ConfigError(
                f"{type(self).__name__} needs reference points: give that of the first decoder "
                "layer a center_prediction, or use detector.queries with references"
            )
        with full_precision(layer_input):
            offsets = self.head_offsets(self._normalise(layer_input))
            offsets = offsets.unflatten(-1, (self.num_levels, self.num_heads, 2))
            pixels = reference_boxes[..., :2] * memory.image_sizes[:, None]  # (B, Q, 2)
            cells = torch.stack([pixels / stride for stride in self.strides], dim=1)
            return cells[:, :, None] + offsets.permute(0, 2, 3, 1, 4)

    def squared_scales(self, layer_input: Tensor) -> Tensor:
        """(B, L, H, Q, n) squared scales, n as `scale.numbers`."""
        with full_precision(layer_input):
            return self.scale(self._normalise(layer_input))

    def log_gaussian(
        self, layer_input: Tensor, reference_boxes: Tensor | None, memory: FeatureTokens
    ) -> Tensor:
        """(B, H, Q, S) logarithms of the Gaussians, at most 0, also on padding."""
        levels = [
            _joined(*_parts(self.scale, weights, centers, shape)).flatten(-2)
            for weights, centers, shape in zip(
                self._level_scales(layer_input),
                self.centers(layer_input, reference_boxes, memory).unbind(1),
                memory.spatial_shapes,
                strict=True,
            )
        ]
        return torch.cat(levels, dim=-1)

    def attention_weights(
        self,
        query: Tensor,
        position: Tensor,
        reference_boxes: Tensor | None,
        memory: FeatureTokens,
        layer_input: Tensor,
    ) -> Tensor:
        """(B, H, Q, S) weights of the tokens, which sum to 1; arguments as of `forward`."""
        heads, keys, _ = self._project_levels(query, position, memory)
        biases = self._biases(layer_input, reference_boxes, memory)
        shares = self.level_weights(layer_input).unsqueeze(1).unbind(-1)  # L of (B, 1, Q)
        scaled = heads * heads.shape[-1] ** -0.5
        weights = [
            (scaled @ key.transpose(-2, -1) + bias).softmax(-1) * share.unsqueeze(-1)
            for key, bias, share in zip(keys, biases, shares, strict=True)
        ]
        return torch.cat(weights, dim=-1)

    def _normalise(self, layer_input: Tensor) -> Tensor:
        return self.norm(layer_input.to(self.norm.weight.dtype))

    def _project_levels(
        self, query: Tensor, position: Tensor, memory: FeatureTokens
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Heads of the queries (B, H, Q, D), and of keys and values (B, H, S_l, D) by level."""
        key = memory.features + memory.positions
        heads, keys, values = self.project(query + position, key, memory.features)
        sizes = memory.level_sizes
        return heads, list(keys.split(sizes, dim=2)), list(values.split(sizes, dim=2))

    def _biases(
        self, layer_input: Tensor, reference_boxes: Tensor | None, memory: FeatureTokens
    ) -> list[Tensor]:
        """For each level (B, H, Q, S_l) to be added to the logits; see `modulation_bias`."""
        masks = memory.split(memory.padding_mask)
        return [
            modulation_bias(self.scale, weights, centers, mask.unflatten(1, shape)).flatten(-2)
            for weights, centers, mask, shape in zip(
                self._level_scales(layer_input),
                self.centers(layer_input, reference_boxes, memory).unbind(1),
                masks,
                memory.spatial_shapes,
                strict=True,
            )
        ]

    def _level_scales(self, layer_input: Tensor) -> list[Tensor]:
        """For each level (B, H, Q, n): squared scales times -f / beta, so below or at 0."""
        levels = zip(self.squared_scales(layer_input).unbind(1), self.distance_factors, strict=True)
        return [scales * (-factor / self.beta) for scales, factor in levels]


class SpatiallyModulatedAttention(ModulatedAttention):
    """Modulated attention to a memory of one level (SMCA).

    Args:
        stride: pixels a cell of the memory.
        scale: as in `ModulatedAttention`; likewise the rest.
    """

    def __init__(
        self,
        *,
        channels: int,
        scale: GaussianScale,
        num_heads: int = 8,
        dropout: float = 0.0,
        stride: float = 32,
        beta: float = 8.0,
        center_prediction: MLP | None = None,
    ) -> None:
        super().__init__(
            channels=channels,
            num_heads=num_heads,
            dropout=dropout,
            scale=scale,
            strides=[stride],
            distance_factors=[1.0],
            beta=beta,
            center_prediction=center_prediction,
        )

    def mix_levels(self, attended: list[Tensor], layer_input: Tensor) -> Tensor:
        """What the queries got from the only level, (B, H, Q, D)."""
        return attended[0]

    def level_weights(self, layer_input: Tensor) -> Tensor:
        """Ones (B, Q, 1)."""
        return layer_input.new_ones(*layer_input.shape[:2], 1)


class ScaleSelectiveModulatedAttention(ModulatedAttention):
    """Modulated attention to each level by itself, weighed by the query: scale selection (SMCA).

    The published code gives all images of a batch the level weights of the first one; here each
    image has its own.

    Args:
        strides: pixels a cell of each level.
        distance_factors: factor on squared distances of each level; the published code has 0.5, 1
            and 2 at strides 16, 32 and 64.
        scale: as in `ModulatedAttention`; likewise the rest.
    """

    def __init__(
        self,
        *,
        channels: int,
        scale: GaussianScale,
        strides: Sequence[float],
        distance_factors: Sequence[float],
        num_heads: int = 8,
        dropout: float = 0.0,
        beta: float = 8.0,
        center_prediction: MLP | None = None,
    ) -> None:
        super().__init__(
            channels=channels,
            num_heads=num_heads,
            dropout=dropout,
            scale=scale,
            strides=strides,
            distance_factors=distance_factors,
            beta=beta,
            center_prediction=center_prediction,
        )
        self.level_selection = xavier_linear(channels, self.num_levels)

    def mix_levels(self, attended: list[Tensor], layer_input: Tensor) -> Tensor:
        """Sum (B, H, Q, D) of the levels, weighed by `level_weights`."""
        weights = self.level_weights(layer_input)[:, None]  # (B, 1, Q, L)
        mixed = torch.stack(attended, dim=-1) * weights.unsqueeze(-2)
        return mixed.sum(-1).to(attended[0].dtype)

    def level_weights(self, layer_input: Tensor) -> Tensor:
        """(B, Q, L) share of each level, the same for all heads; the shares sum to 1."""
        with full_precision(layer_input):
            return self.level_selection(self._normalise(layer_input)).softmax(-1)


def full_precision(tensor: Tensor) -> torch.autocast:
    """No mixed precision: in half precision a centre would jump by a quarter of a cell."""
    return torch.autocast(tensor.device.type, enabled=False)


def modulation_bias(
    scale: GaussianScale, weights: Tensor, centers: Tensor, padding: Tensor
) -> Tensor:
    """The logarithm of Gaussians on one level, but for a constant of each, and -inf on padding.

    The softmax does not see the constant. It keeps the largest values inside the range of half
    precision when a centre is far off the map.

    Args:
        scale: kind of the Gaussians' widths.
        weights: (B, H, Q, n) squared scales times a factor below 0.
        centers: (B, H, Q, 2) centres (x, y), in cells.
        padding: (B, H_l, W_l) bool, True on padding: whole columns and whole rows.

    Returns:
        (B, H, Q, H_l, W_l).
    """
    columns, rows, product = _parts(scale, weights, centers, padding.shape[1:])
    padding = padding[:, None, None]  # (B, 1, 1, H_l, W_l)
    columns = columns.masked_fill(padding.all(-2), -torch.inf)
    rows = rows.masked_fill(padding.all(-1), -torch.inf)
    if product is None:
        # Highest values of the parts are cheap to find, and add up to the highest of the sum.
        return _joined(_below_zero(columns, (-1,)), _below_zero(rows, (-1,)), None)
    return _below_zero(_joined(columns, rows, product), (-2, -1))


def _parts(
    scale: GaussianScale, weights: Tensor, centers: Tensor, shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Parts (B, H, Q, W_l), (B, H, Q, H_l) and, or None, (B, H, Q, H_l, W_l) of the logarithm."""
    x, y = centers.unsqueeze(-1).unbind(-2)  # (B, H, Q, 1)
    rows = torch.arange(shape[0], dtype=centers.dtype, device=centers.device)
    columns = torch.arange(shape[1], dtype=centers.dtype, device=centers.device)
    x_squared, y_squared = (x - columns).square(), (y - rows).square()
    of_columns, of_rows = scale.axis_terms(weights, x_squared, y_squared)
    return of_columns, of_rows, scale.product_term(weights, x_squared, y_squared)


def _below_zero(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Shift so that the highest value along `dims` is 0."""
    return tensor - tensor.detach().amax(dims, keepdim=True)


def _joined(columns: Tensor, rows: Tensor, product: Tensor | None) -> Tensor:
    """Sum (B, H, Q, H_l, W_l) of what `_parts` returns."""
    total = rows.unsqueeze(-1) + columns.unsqueeze(-2)
    return total if product is None else total + product
