"""The proposal head: every token predicts classes and a box (Deformable DETR, section 4.2).

A token proposes the box around its own centre whose side grows with the level; the head refines it.
Tokens whose proposal touches the border of the image, and padding, are invalid: their features are
zeroed before the transform and their box logits are infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import xavier_linear
from efficient_detr.modeling.tokenizer import cell_centers
from efficient_detr.structures import FeatureTokens, Proposals


class ProposalHead(nn.Module):
    """Transform tokens and predict classes and boxes from them.

    Args:
        channels: C.
        head: class and box prediction; None if only a token selection reads the transformed tokens,
            as in front of a decoder with learned queries.
        base_size: side of the proposal on the finest level, as a part of the image; it doubles
            from level to level.
    """

    def __init__(
        self, *, channels: int, head: PredictionHead | None = None, base_size: float = 0.05
    ) -> None:
        super().__init__()
        self.projection = xavier_linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.head = head
        self.base_size = base_size

    def forward(self, memory: FeatureTokens) -> Proposals:
        """Predict from every token of the encoder's memory.

        Raises:
            ConfigError: if there is no head.
        """
        if self.head is None:
            raise ConfigError("detector.proposals (ProposalHead) cannot predict: set its head")
        boxes, valid = self.proposal_boxes(memory)
        features = self._transform(memory.features, valid)
        return Proposals(
            features=features,
            logits=self.head.classify(features),
            box_logits=self.head.regress(features) + _logits(boxes, valid),
        )

    def anchor_logits(self, tokens: FeatureTokens) -> Tensor:
        """(B, S, 4) unrefined boxes before the sigmoid, +inf on invalid tokens."""
        return _logits(*self.proposal_boxes(tokens))

    def transform(self, tokens: FeatureTokens, features: Tensor) -> Tensor:
        """Zero the invalid tokens, then project and normalise.

        Args:
            tokens: the layout that decides which tokens are valid.
            features: (B, S, C) features to transform.

        Returns:
            (B, S, C).
        """
        _, valid = self.proposal_boxes(tokens)
        return self._transform(features, valid)

    def _transform(self, features: Tensor, valid: Tensor) -> Tensor:
        return self.norm(self.projection(features.masked_fill(~valid.unsqueeze(-1), 0)))

    def proposal_boxes(self, tokens: FeatureTokens) -> tuple[Tensor, Tensor]:
        """The unrefined box of each token.

        Returns:
            boxes (B, S, 4) as (cx, cy, w, h) of the unpadded image, and whether each is valid
            (B, S): not padding and every coordinate strictly between 0.01 and 0.99.
        """
        boxes = []
        for level, (height, width) in enumerate(tokens.spatial_shapes):
            full = torch.tensor([width, height], device=tokens.valid_ratios.device)
            valid_size = (tokens.valid_ratios[:, None, level] * full).round()  # (B, 1, 2) cells
            centers = cell_centers((height, width), valid_size.device) / valid_size
            sizes = torch.full_like(centers, self.base_size * 2.0**level)
            boxes.append(torch.cat([centers, sizes], dim=-1))
        boxes_all = torch.cat(boxes, dim=1)
        inside = ((boxes_all > 0.01) & (boxes_all < 0.99)).all(-1)
        return boxes_all, inside & ~tokens.padding_mask


def _logits(boxes: Tensor, valid: Tensor) -> Tensor:
    return torch.log(boxes / (1 - boxes)).masked_fill(~valid.unsqueeze(-1), torch.inf)
