"""Dense multi-head self-attention with positions on queries and keys (DETR, appendix A.3)."""

from __future__ import annotations

from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Every query attends to every query; positions are added to queries and keys, not to values.

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: H.
        dropout: probability on the attention weights.
    """

    def __init__(self, *, channels: int, num_heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)
        nn.init.xavier_uniform_(self.attention.out_proj.weight)

    def forward(
        self, query: Tensor, position: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C) features.
            position: (B, Q, C) position embeddings.
            attention_mask: (Q, Q) bool, True where row may not look at column, or None.

        Returns:
            (B, Q, C) without the residual.
        """
        located = query + position
        return self.attention(
            located, located, query, attn_mask=attention_mask, need_weights=False
        )[0]
