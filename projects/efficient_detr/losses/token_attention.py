"""Supervision of Sparse DETR's token scores: which tokens the decoder attends to (section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.losses.interface import DetectorLoss
from efficient_detr.modeling.detector import Detector
from efficient_detr.structures import (
    DetectorOutput,
    FeatureTokens,
    Targets,
    TokenSelection,
)

NO_SELECTION = (
    "TokenAttentionLoss supervises a token selection, but model.detector.selection is not set: "
    "remove the loss from model.losses or add a selection"
)
NO_ATTENTION = (
    "TokenAttentionLoss needs the decoder's attention to tokens: set "
    "model.detector.decoder.map_token_attention=True, with cross-attention that can tell where it "
    "looks (DeformableDecoderAttention), or use ForegroundLoss"
)


class TokenAttentionLoss(DetectorLoss):
    """`loss_token_selection`: binary cross-entropy of the token scores.

    A token is positive if it is among the tokens with the most attention from the decoder, as many
    as the image keeps. The authors' code calls the term `loss_mask_prediction`. In training under
    Detectron2's event storage, the shares of `kept_attention` are logged as
    `token_attention_kept` and `token_attention_kept_<level>`.

    Args:
        weight: factor of the loss.
    """

    supervises_selection = True

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def check_detector(self, detector: Detector) -> None:
        """Refuse a detector without selection, or whose decoder does not map its attention."""
        if detector.selection is None:
            raise ConfigError(NO_SELECTION)
        if not detector.decoder.map_token_attention:
            raise ConfigError(NO_ATTENTION)

    def forward(self, output: DetectorOutput, targets: list[Targets]) -> dict[str, Tensor]:
        """Mean over images of the mean over all S tokens.

        Padding counts as negative, with the lowest score of the batch, as published: the term of an
        image depends on the padding and, through that score, on the other images.

        Raises:
            ConfigError: if the detector selects no tokens or its decoder maps no attention.
        """
        selection, attention = _selection_and_attention(output)
        wanted = attended_tokens(attention, output.memory.padding_mask, selection.counts)
        loss = F.binary_cross_entropy_with_logits(selection.scores.float(), wanted)
        if has_event_storage():
            _log(kept_attention(selection, attention, output.memory))
        return {"loss_token_selection": self.weight * loss}


@torch.no_grad()
def attended_tokens(attention: Tensor, padding_mask: Tensor, counts: Tensor) -> Tensor:
    """Mark the tokens with the most attention.

    Args:
        attention: (B, S) attention that each token gets.
        padding_mask: (B, S) bool, True on padding, which ranks last.
        counts: (B,) how many tokens of each image to mark.

    Returns:
        (B, S) float32, 1 on marked tokens and 0 elsewhere.
    """
    attention = attention.float()
    ranked = torch.where(padding_mask, attention.min() - 1, attention)
    return _marked(ranked.topk(int(counts.max()), dim=1).indices, counts, attention)


@torch.no_grad()
def kept_attention(
    selection: TokenSelection, attention: Tensor, tokens: FeatureTokens
) -> tuple[Tensor, Tensor]:
    """Share of the decoder's attention that falls on the tokens of the first encoder layer.

    The authors' code logs it as `corr_mask_attn_map_dec_*`; there, the rows that fill up the
    selection of a smaller image count as kept, here they do not.

    Args:
        selection: which tokens were kept.
        attention: (B, S) attention that each token gets.
        tokens: gives the layout.

    Returns:
        The share over all levels (B,) and of each level (B, L), in [0, 1]; 0 where nothing is
        attended to.
    """
    kept = _marked(selection.indices[0], selection.counts, attention)
    total = torch.stack([level.sum(1) for level in tokens.split(attention)], dim=1)  # (B, L)
    hit = torch.stack([level.sum(1) for level in tokens.split(attention * kept)], dim=1)
    tiny = torch.finfo(total.dtype).tiny
    return hit.sum(1) / total.sum(1).clamp(min=tiny), hit / total.clamp(min=tiny)


def _marked(indices: Tensor, counts: Tensor, like: Tensor) -> Tensor:
    """1 at the first `counts` (B,) of the token indices (B, N), else 0; shaped `like` (B, S)."""
    rows = torch.arange(indices.shape[1], device=indices.device)
    marks = (rows < counts[:, None]).to(like.dtype)
    return torch.zeros_like(like).scatter(1, indices, marks)


def _selection_and_attention(output: DetectorOutput) -> tuple[TokenSelection, Tensor]:
    if output.selection is None:
        raise ConfigError(NO_SELECTION)
    if output.decoder.token_attention is None:
        raise ConfigError(NO_ATTENTION)
    return output.selection, output.decoder.token_attention


def _log(shares: tuple[Tensor, Tensor]) -> None:
    everywhere, levels = (share.mean(0) for share in shares)
    storage = get_event_storage()
    storage.put_scalar("token_attention_kept", everywhere.item())
    for level, share in enumerate(levels.tolist()):
        storage.put_scalar(f"token_attention_kept_{level}", share)
