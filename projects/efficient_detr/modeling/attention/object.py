"""The first half of Focus-DETR's dual attention (section 3.3): object tokens enhance each other.

Among the tokens that a layer updates, those with the highest object scores attend to each other
densely; deformable attention over all active tokens follows in the layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from efficient_detr.modeling.attention.dense import SelfAttention
from efficient_detr.structures import gather_tokens


class ObjectSelfAttention(nn.Module):
    """Self-attention, residual and norm over the tokens most likely to belong to an object.

    Args:
        attention: dense self-attention.
        channels: C.
        num_tokens: how many object tokens take part; all active tokens if there are fewer.
    """

    def __init__(self, *, attention: SelfAttention, channels: int, num_tokens: int = 300) -> None:
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(channels)
        self.num_tokens = num_tokens

    def select(self, object_scores: Tensor) -> Tensor:
        """(B, M) indices of the highest of the object scores (B, N), best first."""
        count = min(self.num_tokens, object_scores.shape[1])
        return object_scores.topk(count, dim=1).indices

    def forward(self, features: Tensor, positions: Tensor, object_scores: Tensor) -> Tensor:
        """Replace the object tokens by their enhanced selves.

        Args:
            features: (B, N, C) active tokens.
            positions: (B, N, C) their position embeddings.
            object_scores: (B, N) their ranking.

        Returns:
            (B, N, C); tokens that did not take part are unchanged.
        """
        indices = self.select(object_scores)
        objects = gather_tokens(features, indices)
        attended = self.attention(objects, gather_tokens(positions, indices))
        enhanced = self.norm(objects + attended).to(features.dtype)
        return features.scatter(1, indices.unsqueeze(-1).expand_as(enhanced), enhanced)
