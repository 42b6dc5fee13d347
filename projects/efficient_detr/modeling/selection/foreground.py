"""Focus-DETR's foreground token selector (section 3.2) with top-down score modulation (3.2, Fig 4).

Every token is scored from the coarsest level to the finest; the score map of a level, enlarged,
modulates the tokens of the next finer level before they are scored themselves. The layers update
ever fewer of the best tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_detr.modeling.selection.base import TokenSelector
from efficient_detr.modeling.selection.score_head import ForegroundScoreHead
from efficient_detr.structures import FeatureTokens


class ForegroundTokenSelector(TokenSelector):
    """Rank all tokens by foreground score and keep a shrinking part of them layer by layer.

    Args:
        score_head: scores the tokens of a level.
        num_levels: L.
        keep_ratio: part of the unpadded tokens that the first layer may update (rho), in (0, 1].
        layer_keep_ratios: for each encoder layer the part of those; see `TokenSelector`.
    """

    def __init__(
        self,
        *,
        score_head: ForegroundScoreHead,
        num_levels: int,
        keep_ratio: float = 0.5,
        layer_keep_ratios: Sequence[float] = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2),
    ) -> None:
        super().__init__(keep_ratio=keep_ratio, layer_keep_ratios=layer_keep_ratios)
        self.score_head = score_head
        self.num_levels = num_levels
        # One scale a transition, the transition to the second coarsest level first. A single level
        # has none, and an empty parameter would wait for its gradient in distributed training.
        scales = torch.empty(num_levels - 1).uniform_(-0.3, 0.3)
        self.modulation = nn.Parameter(scales) if num_levels > 1 else None

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
            assert self.modulation is not None
            enlarged = enlarged.flatten(1).unsqueeze(-1)  # (B, S_l, 1)
            modulated = levels[index] + self.modulation[step] * levels[index] * enlarged
            logits.insert(0, self.score_head(modulated))
            coarser = shape
        return logits
