"""How wide the Gaussians of spatially modulated attention are, and along which axes (SMCA).

The published code multiplies squared distances by the square of a predicted number, so that number
is an inverse width: 0 switches the modulation off, large numbers make it narrow. Each kind of scale
(`type1` to `type4` of the published code) is a class with the same arguments.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn


class GaussianScale(nn.Module):
    """Gives squared inverse widths and weighs squared distances with them.

    Args:
        channels: C of the queries.
        num_heads: H; every head has Gaussians of its own.
        num_levels: L.

    Attributes:
        numbers: n, numbers a head and level.
        axes: which of these weighs the distance along x, and which along y.
    """

    numbers: ClassVar[int]
    axes: ClassVar[tuple[int, int]]

    def __init__(self, *, channels: int, num_heads: int = 8, num_levels: int = 1) -> None:
        super().__init__()
        self.num_heads, self.num_levels = num_heads, num_levels

    def forward(self, features: Tensor) -> Tensor:
        """Squared scales (B, L, H, Q, n), at least 0 and unbounded, of features (B, Q, C)."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def axis_terms(
        self, weights: Tensor, x_squared: Tensor, y_squared: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The parts of the logarithm that depend on one coordinate only.

        Args:
            weights: (B, H, Q, n) squared scales times a common factor.
            x_squared: (B, H, Q, W_l) squared distances to each column, in cells.
            y_squared: (B, H, Q, H_l) squared distances to each row.

        Returns:
            (B, H, Q, W_l) and (B, H, Q, H_l).
        """
        x, y = self.axes
        return weights[..., x, None] * x_squared, weights[..., y, None] * y_squared

    def product_term(self, weights: Tensor, x_squared: Tensor, y_squared: Tensor) -> Tensor | None:
        """The part (B, H, Q, H_l, W_l) that depends on both coordinates, or None without any."""
        return None


class ConstantScale(GaussianScale):
    """Every Gaussian has the same width, and nothing is learned (`type1`)."""

    numbers = 1
    axes = (0, 0)

    def forward(self, features: Tensor) -> Tensor:
        """Ones (B, L, H, Q, 1) for features (B, Q, C)."""
        batch, queries = features.shape[:2]
        return features.new_ones(batch, self.num_levels, self.num_heads, queries, 1)


class PredictedScale(GaussianScale):
    """The query predicts the numbers; before training they are 1, whatever the query."""

    def __init__(self, *, channels: int, num_heads: int = 8, num_levels: int = 1) -> None:
        super().__init__(channels=channels, num_heads=num_heads, num_levels=num_levels)
        self.projection = nn.Linear(channels, num_levels * num_heads * self.numbers)
        nn.init.zeros_(self.projection.weight)
        nn.init.ones_(self.projection.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Squares (B, L, H, Q, n) of what is predicted from features (B, Q, C)."""
        grid = (self.num_levels, self.num_heads, self.numbers)
        predicted = self.projection(features).unflatten(-1, grid)  # (B, Q, L, H, n)
        return predicted.permute(0, 2, 3, 1, 4).square()


class HeadScale(PredictedScale):
    """A width for each query and head: round Gaussians (`type2`)."""

    numbers = 1
    axes = (0, 0)


class AxisScale(PredictedScale):
    """A width and a height for each query and head (`type3`, that of all published results)."""

    numbers = 2
    axes = (0, 1)


class AxisProductScale(PredictedScale):
    """`AxisScale` and a third number that weighs the product of both squared distances (`type4`).

    The product makes the corners around the centre darker than the axes.
    """

    numbers = 3
    axes = (0, 1)

    def product_term(self, weights: Tensor, x_squared: Tensor, y_squared: Tensor) -> Tensor:
        """The weighted product (B, H, Q, H_l, W_l); arguments as in `axis_terms`."""
        weighted = weights[..., 2, None] * y_squared
        return weighted.unsqueeze(-1) * x_squared.unsqueeze(-2)
