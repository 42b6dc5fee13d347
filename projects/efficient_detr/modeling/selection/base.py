"""What token selections share: counts and one ranking, made before the first encoder layer.

A selection keeps the same part of the unpadded tokens of every image, the best by score. All layers
draw on one ranking: layer i updates the best `layer_keep_ratios[i]` of it. Only the scores differ
between the methods.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.queries.proposals import ProposalHead
from efficient_detr.structures import FeatureTokens, TokenSelection


class TokenSelector(nn.Module):
    """Base of the selections; a subclass says how tokens are scored.

    Args:
        keep_ratio: part of the unpadded tokens that the first layer may update (rho), in (0, 1].
        layer_keep_ratios: for each encoder layer the part of those, in (0, 1]. It is taken of the
            largest number in the batch, as published: in later layers an image beside a larger one
            may keep more of its tokens than alone, but never more than `keep_ratio`.

    Raises:
        ConfigError: if a ratio is out of its range.
    """

    def __init__(self, *, keep_ratio: float, layer_keep_ratios: Sequence[float]) -> None:
        super().__init__()
        for name, ratio in [("keep_ratio", keep_ratio)] + [
            ("layer_keep_ratios", ratio) for ratio in layer_keep_ratios
        ]:
            if not 0 < ratio <= 1:
                raise ConfigError(f"selection.{name} must be in (0, 1], not {ratio}")
        self.keep_ratio = keep_ratio
        self.layer_keep_ratios = tuple(layer_keep_ratios)

    def score_levels(self, features: Tensor, tokens: FeatureTokens) -> list[Tensor]:
        """Raw foreground logits (B, S_l) of each level, finest first.

        Args:
            features: (B, S, C) transformed tokens.
            tokens: gives their layout.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define score_levels")

    def forward(self, tokens: FeatureTokens, proposals: ProposalHead) -> TokenSelection:
        """Choose the tokens of every encoder layer.

        Args:
            tokens: the tokens from the neck.
            proposals: its transform, shared with the two-stage proposals, prepares the tokens.
        """
        features = proposals.transform(tokens, tokens.features + tokens.positions)
        level_logits = self.score_levels(features, tokens)
        scores = torch.cat(level_logits, dim=1)
        scores = torch.where(tokens.padding_mask, scores.min(), scores)
        valid = (~tokens.padding_mask).sum(1)
        counts = torch.minimum((self.keep_ratio * valid).long() + 1, valid)  # (B,)
        indices = self._nested_indices(scores, int(counts.max()))
        return TokenSelection(indices, counts, scores, level_logits)

    def _nested_indices(self, scores: Tensor, largest: int) -> list[Tensor]:
        """For each layer the indices of its tokens: prefixes of one ranking, never empty."""
        ranking = scores.topk(largest, dim=1).indices
        # The published code rounds the product in single precision; so must the counts.
        sizes = [int(np.float32(ratio) * np.float32(largest)) for ratio in self.layer_keep_ratios]
        return [ranking[:, : max(size, 1)] for size in sizes]
