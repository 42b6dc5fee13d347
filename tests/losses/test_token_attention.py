"""The supervision of token scores by the decoder's attention."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.losses.token_attention import (
    TokenAttentionLoss,
    attended_tokens,
    kept_attention,
)
from efficient_detr.structures import (
    DecoderOutput,
    DetectorOutput,
    FeatureTokens,
    TokenSelection,
)
from tests.tiny_models import logit, random_tokens, targets_of

SHAPES = [(2, 2), (1, 2)]  # tokens 0 to 3 and 4 to 5


def output_of(
    scores: Tensor,
    attention: Tensor | None,
    indices: list[list[int]],
    counts: list[int],
    tokens: FeatureTokens,
) -> DetectorOutput:
    empty = torch.zeros(1, len(scores), 1, 4)
    return DetectorOutput(
        decoder=DecoderOutput(empty, empty, token_attention=attention),
        memory=tokens,
        selection=TokenSelection([torch.tensor(indices)], torch.tensor(counts), scores, []),
    )


def test_the_most_attended_tokens_are_positive() -> None:
    """As many as the image keeps; more in the first image than in the second."""
    attention = torch.tensor([[0.2, 0.9, 0.1, 0.5, 0.4, 0.0], [3.0, 1.0, 2.0, 0.0, 5.0, 4.0]])
    padding = torch.zeros(2, 6, dtype=torch.bool)
    wanted = attended_tokens(attention, padding, torch.tensor([3, 1]))
    assert wanted.tolist() == [[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]]


def test_attended_padding_is_no_positive() -> None:
    """Not even where every other token got nothing."""
    attention = torch.tensor([[0.0, 0.0, 7.0]])
    wanted = attended_tokens(attention, torch.tensor([[False, False, True]]), torch.tensor([2]))
    assert wanted.tolist() == [[1, 1, 0]]


def test_loss_is_the_mean_cross_entropy() -> None:
    """Tokens 1 and 3 are positive, with probabilities 0.75 and 0.5; the others have 0.5, 0.25, 0.5,
    0.5. The cross-entropies are -ln of 0.75 and 0.5, and of 0.5, 0.75, 0.5 and 0.5.
    """
    scores = torch.tensor([[logit(p) for p in (0.5, 0.75, 0.25, 0.5, 0.5, 0.5)]])
    attention = torch.tensor([[0.0, 0.9, 0.1, 0.5, 0.4, 0.0]])
    output = output_of(scores, attention, [[1, 0]], [2], random_tokens(SHAPES))
    losses = TokenAttentionLoss(weight=3.0)(output, targets_of([]))
    expected = -(2 * math.log(0.75) + 4 * math.log(0.5)) / 6
    assert list(losses) == ["loss_token_selection"]
    assert losses["loss_token_selection"].item() == pytest.approx(3 * expected)


def test_padding_pushes_the_lowest_score_down() -> None:
    """Padding carries the lowest score of the batch, so its share of the gradient goes there.

    The gradient of a negative is sigmoid(score) / 6, that of the positive token 0 one less before
    the division. The lowest score, that of token 2, is 0: it gets 0.5 / 6 for itself and as much
    for each of two padded tokens.
    """
    raw = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0]], requires_grad=True)
    padding = torch.tensor([[False, False, False, False, True, True]])
    scores = torch.where(padding, raw.min(), raw)  # as a TokenSelector hands them over
    tokens = dataclasses.replace(random_tokens(SHAPES), padding_mask=padding)
    attention = torch.tensor([[1.0, 0.0, 0.0, 0.0, 9.0, 9.0]])
    output = output_of(scores, attention, [[0]], [1], tokens)
    (loss,) = TokenAttentionLoss()(output, targets_of([])).values()
    loss.backward()
    probability = 1 / (1 + math.exp(-1))
    expected = [[probability - 1, probability, 3 * 0.5, probability, 0, 0]]
    torch.testing.assert_close(raw.grad, torch.tensor(expected) / 6)


def test_kept_attention() -> None:
    """The first image keeps tokens 0, 3 and 4 of the attention 1, 2, 3, 4 | 5, 5.

    That is 5 of 10 on either level. The second keeps token 1 of 0, 1, 0, 3 | 0, 0: its further
    indices fill up the batch.
    """
    attention = torch.tensor([[1.0, 2, 3, 4, 5, 5], [0.0, 1, 0, 3, 0, 0]])
    selection = TokenSelection(
        [torch.tensor([[0, 3, 4], [1, 3, 2]])], torch.tensor([3, 1]), torch.zeros(2, 6), []
    )
    everywhere, levels = kept_attention(selection, attention, random_tokens(SHAPES, batch=2))
    torch.testing.assert_close(everywhere, torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(levels, torch.tensor([[0.5, 0.5], [0.25, 0.0]]))


def test_shares_are_logged_where_detectron2_listens() -> None:
    attention = torch.tensor([[1.0, 2, 3, 4, 5, 5]])
    output = output_of(torch.zeros(1, 6), attention, [[0, 1, 4]], [3], random_tokens(SHAPES))
    with EventStorage() as storage:
        TokenAttentionLoss()(output, targets_of([]))
        latest = {name: value for name, (value, _) in storage.latest().items()}
    expected = {"token_attention_kept": 0.4, "token_attention_kept_0": 0.3}
    assert latest == pytest.approx(expected | {"token_attention_kept_1": 0.5})


def test_what_is_missing_is_named() -> None:
    output = output_of(torch.zeros(1, 6), None, [[0]], [1], random_tokens(SHAPES))
    with pytest.raises(ConfigError, match=r"set model\.detector\.decoder\.map_token_attention"):
        TokenAttentionLoss()(output, targets_of([]))
    with pytest.raises(ConfigError, match=r"model\.detector\.selection is not set"):
        TokenAttentionLoss()(dataclasses.replace(output, selection=None), targets_of([]))
