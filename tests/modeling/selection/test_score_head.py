"""The network that scores tokens against their surroundings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from efficient_detr.modeling.selection import ForegroundScoreHead


def test_score_head_formula() -> None:
    head: Any = ForegroundScoreHead(channels=8)
    x = torch.randn(2, 5, 8)
    gelu = nn.functional.gelu
    hidden = gelu(head.project(head.norm(x)))
    local = hidden[..., :4]
    mean = hidden[..., 4:].sum(1, keepdim=True) / 5
    mixed = torch.cat([local, mean.repeat(1, 5, 1)], dim=-1)
    expected = head.score(gelu(head.hidden[1](gelu(head.hidden[0](mixed)))))
    torch.testing.assert_close(head(x), expected[..., 0])
    assert [tuple(layer.weight.shape) for layer in head.hidden] == [(4, 8), (2, 4)]


def test_a_token_is_judged_against_the_others() -> None:
    """Another token of the image changes the score, through the mean; another image does not."""
    head = ForegroundScoreHead(channels=8)
    x = torch.randn(2, 5, 8)
    changed = x.clone()
    changed[0, 4] += torch.randn(8)
    before, after = head(x), head(changed)
    assert (before[0, :4] != after[0, :4]).all()
    assert torch.equal(before[1], after[1])
    order = [3, 1, 4, 0, 2]
    torch.testing.assert_close(head(x[:, order]), before[:, order])
