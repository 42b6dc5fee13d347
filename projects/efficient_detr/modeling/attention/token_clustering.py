"""Which tokens of a head are alike: E2LSH hashing with projections that a module keeps.

The hash is that of `efficient_detr.ops.lsh_clustering`; how likely near tokens meet is said in
`efficient_detr.ops.lsh_theory`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.ops.lsh_clustering import (
    ClusterAssignment,
    HashProjections,
    cluster_tokens,
    distinct_multipliers,
    draw_projections,
)


class TokenClustering(nn.Module):
    """Clusters the tokens of each head by E2LSH hashing.

    The projections are drawn once, when the module is built, from a generator of its own: they
    depend on `seed` alone, are the same on every device, and are no part of the state dict.

    Args:
        head_channels: D, channels of a head.
        rounds: T, rounds of hashing; more of them make more and tighter clusters.
        width: r, of a hash cell, in units of the projected tokens.
        bias_range: hash biases are uniform in [0, bias_range). 1 is what the published code does;
            the theory asks for `width`, which makes far fewer clusters.
        multipliers: (T,) int64 that make a key of the cells, from `distinct_multipliers` (None) or
            `published_multipliers`.
        include_padding: let padded tokens join clusters, as in the publication. The results of an
            image then depend on how much it is padded.
        redraw: in training, draw new projections at every forward pass, as the published code
            always does. Their seed is the next number of torch's global CPU generator, so that a
            training that seeds the generators at every iteration, as ours does, can be repeated
            and resumed. Evaluation always uses the stored projections.
        seed: of the stored projections; layers with different seeds hash differently.

    Raises:
        ConfigError: if an argument is out of range.
    """

    directions: Tensor
    bias: Tensor
    multipliers: Tensor

    def __init__(
        self,
        *,
        head_channels: int,
        rounds: int = 32,
        width: float = 8.0,
        bias_range: float = 1.0,
        multipliers: Tensor | None = None,
        include_padding: bool = False,
        redraw: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_hashing(rounds, width, bias_range, multipliers)
        self.head_channels = head_channels
        self.rounds = rounds
        self.width = width
        self.bias_range = bias_range
        self.include_padding = include_padding
        self.redraw = redraw
        drawn = self._draw(seed)
        factors = distinct_multipliers(rounds) if multipliers is None else multipliers
        device = torch.get_default_device()
        self.register_buffer("directions", drawn.directions.to(device), persistent=False)
        self.register_buffer("bias", drawn.bias.to(device), persistent=False)
        self.register_buffer("multipliers", factors.to(device).clone(), persistent=False)

    @property
    def projections(self) -> HashProjections:
        """The stored projections."""
        return HashProjections(self.directions, self.bias, self.width, self.multipliers)

    def set_projections(self, directions: Tensor, bias: Tensor) -> None:
        """Replace the stored projections, for example by those of another implementation.

        Args:
            directions: (D, T).
            bias: (T,).

        Raises:
            ValueError: if a shape is another one.
        """
        for name, new, old in (
            ("directions", directions, self.directions),
            ("bias", bias, self.bias),
        ):
            if new.shape != old.shape:
                raise ValueError(f"{name} must be {tuple(old.shape)}, but are {tuple(new.shape)}")
            old.copy_(new)

    def forward(self, points: Tensor, padding_mask: Tensor | None = None) -> ClusterAssignment:
        """Cluster tokens; no gradient flows through the assignment.

        Args:
            points: (B, H, N, D) queries, already scaled by D^-0.5, or keys. Hashed in float32.
            padding_mask: (B, N) bool, True on padding, or None.

        Returns:
            The clusters of each row (B, H); padded tokens have none unless they are included.
        """
        projections = self.projections
        if self.redraw and self.training:
            drawn = self._draw(int(torch.randint(2**62, (), device="cpu")))
            projections = dataclasses.replace(
                projections,
                directions=drawn.directions.to(self.directions),
                bias=drawn.bias.to(self.bias),
            )
        return cluster_tokens(points, projections, self.excluded(padding_mask))

    def excluded(self, padding_mask: Tensor | None) -> Tensor | None:
        """The mask (B, N) of tokens that join no cluster, given that of the padding."""
        return None if self.include_padding else padding_mask

    def _draw(self, seed: int) -> HashProjections:
        with torch.device("cpu"):  # a GPU draws other numbers from the same seed
            return draw_projections(
                self.head_channels,
                self.rounds,
                width=self.width,
                bias_range=self.bias_range,
                generator=torch.Generator().manual_seed(seed),
            )

    def extra_repr(self) -> str:
        """The numbers that `print(model)` shows."""
        return f"rounds={self.rounds}, width={self.width}, bias_range={self.bias_range}"


def _check_hashing(
    rounds: int, width: float, bias_range: float, multipliers: Tensor | None
) -> None:
    if rounds < 1:
        raise ConfigError(f"TokenClustering.rounds={rounds}: give at least one round of hashing")
    if not 1e-6 <= width <= 1e6:
        raise ConfigError(f"TokenClustering.width={width}: give a number from 1e-6 to 1e6")
    if bias_range < 0:
        raise ConfigError(f"TokenClustering.bias_range={bias_range}: give a number from 0 on")
    if multipliers is not None and multipliers.shape != (rounds,):
        raise ConfigError(
            f"TokenClustering.multipliers has {multipliers.numel()} entries for "
            f"rounds={rounds}: give one for each round"
        )


def hashed_queries(query: Tensor) -> Tensor:
    """Queries (B, H, N, D) of heads as they are hashed: scaled as they enter the logits.

    In float32 or better, because 16 bits would round the product.
    """
    points = query.detach().to(torch.promote_types(query.dtype, torch.float32))
    return points * query.shape[-1] ** -0.5
