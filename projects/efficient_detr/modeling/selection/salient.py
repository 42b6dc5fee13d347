"""Sparse DETR's salient token selector: which tokens the decoder is going to look at.

One network scores the tokens of all levels at once, and every encoder layer updates the same
tokens. The scores are trained to find the tokens that the decoder attends to; see
`losses.TokenAttentionLoss`.
"""

from __future__ import annotations

from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.selection.base import TokenSelector
from efficient_detr.modeling.selection.score_head import ForegroundScoreHead
from efficient_detr.structures import FeatureTokens


class SalientTokenSelector(TokenSelector):
    """Keep the tokens with the highest scores, the same in all layers.

    The score head averages over all S tokens, padding included, as published: the scores of an
    image change a little with the padding of its batch.

    Args:
        score_head: scores all tokens against each other.
        num_layers: number of encoder layers.
        keep_ratio: part of the unpadded tokens that the layers update (rho), in (0, 1].
    """

    def __init__(
        self, *, score_head: ForegroundScoreHead, num_layers: int, keep_ratio: float = 0.3
    ) -> None:
        if num_layers < 1:
            raise ConfigError(f"selection.num_layers must be at least 1, not {num_layers}")
        super().__init__(keep_ratio=keep_ratio, layer_keep_ratios=[1.0] * num_layers)
        self.score_head = score_head

    def score_levels(self, features: Tensor, tokens: FeatureTokens) -> list[Tensor]:
        """See `TokenSelector`; a token's score depends on the tokens of every level."""
        return tokens.split(self.score_head(features))
