"""Focus-DETR's foreground token selector (section 3.2) with top-down score modulation (3.2, Fig 4).

Every token is scored from the coarsest level to the finest; the score map of a level, enlarged,
modulates the tokens of the next finer level before they are scored themselves. One ranking, made
before the first layer, serves all layers: layer i keeps the best `layer_keep_ratios[i]` of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.layers import xavier_linear
from efficient_detr.modeling.queries.proposals import ProposalHead
from efficient_detr.structures import FeatureTokens, TokenSelection


class ForegroundScoreHead(nn.Module):
    """Score the tokens of one level from their features and the mean of the level.

    Half of the channels are replaced by their mean over the level (padding included, as published),
    so that a token is judged against its surroundings.

    Args:
        channels: C, a multiple of 4.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.project = xavier_linear(channels, channels)
        self.hidden = nn.ModuleList(
            [xavier_linear(channels, channels // 2), xavier_linear(channels // 2, channels // 4)]
        )
        self.score = xavier_linear(channels // 4, 1)
        self.activation = nn.GELU()

    def forward(self, features: Tensor) -> Tensor:
        """Map the tokens of a level (B, S_l, C) to foreground logits (B, S_l)."""
        features = self.activation(self.project(self.norm(features)))
        local, surrounding = features.chunk(2, dim=-1)
        mean = surrounding.mean(dim=1, keepdim=True).expand_as(surrounding)
        features = torch.cat([local, mean], dim=-1)
        for layer in self.hidden:
            features = self.activation(layer(features))
        return self.score(features).squeeze(-1)


class ForegroundTokenSelector(nn.Module):
    """Rank all tokens by foreground score and keep a shrinking part of them layer by layer.

    Args:
        score_head: scores the tokens of a level.
        num_levels: L.
        keep_ratio: part of the unpadded tokens that the first layer may update (rho).
        layer_keep_ratios: for each encoder layer the part of those, in (0, 1]. It is taken of the
            largest number in the batch, as published: in later layers an image beside a larger one
            may keep more of its tokens than alone, but never more than `keep_ratio`.
    """

    def __init__(
        self,
        *,
        score_head: ForegroundScoreHead,
        num_levels: int,
        keep_ratio: float = 0.5,
        layer_keep_ratios: Sequence[float] = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2),
    ) -> None:
        super().__init__()
        for name, ratio in [("keep_ratio", keep_ratio)] + [
            ("layer_keep_ratios", ratio) for ratio in layer_keep_ratios
        ]:
            if not 0 < ratio <= 1:
                raise ConfigError(f"selection.{name} must be in (0, 1], not {ratio}")
        self.score_head = score_head
        self.num_levels = num_levels
        self.keep_ratio = keep_ratio
        self.layer_keep_ratios = tuple(layer_keep_ratios)
        # One scale a transition, the transition to the second coarsest level first.
        self.modulation = nn.Parameter(torch.empty(num_levels - 1).uniform_(-0.3, 0.3))

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

    def score_levels(self, features: Tensor, tokens: FeatureTokens) -> list[Tensor]:
        """Raw foreground logits (B, S_l) of each level, finest first, scored top down.

        Args:
            features: (B, S, C) transformed tokens.
            tokens: gives their layout.
        """
        levels = tokens.split(features)
        logits = [self.score_head(levels[-1])]
        coarser = tokens.spatial_shapes[-1]
        for step, index in enumerate(reversed(range(len(levels) - 1))):
            shape = tokens.spatial_shapes[index]
            enlarged = F.interpolate(
                logits[0].unflatten(1, coarser)[:, None].float(),
                size=shape,
                mode="bilinear",
                align_corners=True,
            )
            enlarged = enlarged.flatten(1).unsqueeze(-1)  # (B, S_l, 1)
            modulated = levels[index] + self.modulation[step] * levels[index] * enlarged
            logits.insert(0, self.score_head(modulated))
            coarser = shape
        return logits

    def _nested_indices(self, scores: Tensor, largest: int) -> list[Tensor]:
        """For each layer the indices of its tokens: prefixes of one ranking, never empty."""
        ranking = scores.topk(largest, dim=1).indices
        # The published code rounds the product in single precision; so must the counts.
        sizes = [int(np.float32(ratio) * np.float32(largest)) for ratio in self.layer_keep_ratios]
        return [ranking[:, : max(size, 1)] for size in sizes]
