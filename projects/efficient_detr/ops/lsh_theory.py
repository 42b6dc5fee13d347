"""What hashing promises: how likely near tokens share a cluster, and what that does to attention.

E2LSH hashing (Datar et al., SCG 2004, section 3), with the cells of `lsh_clustering`:

    cell(x) = floor((x . direction + bias) / width),   direction ~ N(0, I), bias ~ U(0, width)

Two tokens at distance d project to values s = d |z| apart, z ~ N(0, 1). A border of the cells, of
which there is one in every `width` and whose place the uniform bias makes random, falls between
them with probability min(s / width, 1). So they share a cell with probability

    p = integral over s from 0 to width of (2 / d) phi(s / d) (1 - s / width)
      = erf(t / sqrt(2)) - sqrt(2 / pi) (1 - exp(-t^2 / 2)) / t,     t = width / d,

and all cells of T independent rounds with probability p^T.

This holds for biases from U(0, width), that is `bias_range=width`. The published code draws them
from U(0, 1): a border then lies just below the origin in every round, hashing goes by direction
rather than by distance, and p is no more than a rough guide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def collision_probability(distance: Tensor, width: float, rounds: int = 1) -> Tensor:
    """The probability that two tokens share a cluster, over the choice of the projections.

    Args:
        distance: Euclidean distances of token pairs, from 0 to infinity, any shape.
        width: of a cell, in the same units.
        rounds: T, rounds of hashing.

    Returns:
        Probabilities of the shape of `distance`: 1 at distance 0, then decreasing to 0. Accidents
        of equal keys for different cells are not counted.

    Raises:
        ValueError: if the width is not positive or there is no round.
    """
    if width <= 0 or rounds < 1:
        raise ValueError(f"width={width} must be positive and rounds={rounds} at least 1")
    distance = torch.as_tensor(distance)
    if not distance.is_floating_point():
        distance = distance.to(torch.get_default_dtype())
    widths = width / distance  # t, infinite at distance 0
    # -expm1 and the division keep their digits where t is small.
    crossed = math.sqrt(2 / math.pi) * -torch.expm1(-widths.square() / 2) / widths
    one_round = torch.erf(widths / math.sqrt(2)) - crossed
    # Infinitely far apart, t = 0.
    one_round = torch.where(widths == 0, torch.zeros_like(one_round), one_round)
    return one_round.clamp(0, 1) ** rounds


def attention_error_bound(
    query_distance: Tensor, key_norm: Tensor | float, value_norm: Tensor | float
) -> Tensor:
    """How much a softmax-attention output can change when a query is replaced by its prototype.

    With |query - prototype| <= e and |key| <= K every logit moves by at most m = e K. Let w and w'
    be the weights before and after, and A the keys that gained weight, with w(A) = a. Then
    w'(A) <= a exp(m) / (a exp(m) + (1 - a) exp(-m)). The gain w'(A) - a is largest for
    a = 1 / (1 + exp(m)), where it is tanh(m / 2). The weights that changed hands are thus at most
    tanh(m / 2), and moving weight from one value to another changes the output by at most twice the
    longest value:

        |output' - output| <= 2 tanh(e K / 2) max |value|

    Args:
        query_distance: e, distances from queries, scaled as they enter the logits, to prototypes.
        key_norm: K, length of the longest key (times the temperature factor, if there is one).
        value_norm: length of the longest value.

    Returns:
        Upper bounds of the Euclidean distance between outputs of a head, in the broadcast shape of
        the arguments. Reached by two keys +-K along the error with opposite values.
    """
    return 2 * torch.tanh(query_distance * key_norm / 2) * value_norm
