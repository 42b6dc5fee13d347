"""Object scores of code and paper."""

from __future__ import annotations

import pytest
import torch

from efficient_detr.modeling.selection import (
    LogitProductScore,
    ObjectScore,
    ProbabilityProductScore,
)
from tests.tiny_models import logit

CLASSES = torch.tensor([[[1.0, -3.0], [-5.0, -2.0], [-4.0, -6.0]]])


def test_product_of_logits() -> None:
    """Highest class logits 1, -2 and -4; the product of two negative logits is positive."""
    scores = LogitProductScore()(CLASSES, torch.tensor([[3.0, 0.5, -2.0]]))
    assert scores.tolist() == [[3.0, -1.0, 8.0]]


def test_product_of_probabilities() -> None:
    classes = torch.tensor([[[logit(0.1), logit(0.8)], [logit(0.5), logit(0.2)]]])
    foreground = torch.tensor([[logit(0.5), logit(0.9)]])
    scores = ProbabilityProductScore()(classes, foreground)
    assert scores[0].tolist() == pytest.approx([0.4, 0.45])


def test_the_two_rank_differently() -> None:
    """Two clear background tokens win under the released code's score, as its weights expect."""
    classes = torch.tensor([[[2.0], [-6.0]]])
    foreground = torch.tensor([[2.0], [-6.0]]).T
    assert LogitProductScore()(classes, foreground).argmax().item() == 1
    assert ProbabilityProductScore()(classes, foreground).argmax().item() == 0


def test_interface() -> None:
    with pytest.raises(NotImplementedError, match="ObjectScore does not define forward"):
        ObjectScore()(CLASSES, torch.zeros(1, 3))
