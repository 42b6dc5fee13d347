"""The interfaces say which method a new attention lacks."""

from __future__ import annotations

import pytest
import torch

from efficient_detr.modeling.attention import DecoderAttention, EncoderAttention
from tests.tiny_models import random_tokens


@pytest.mark.parametrize("interface", [EncoderAttention, DecoderAttention])
def test_forward_is_abstract(interface: type) -> None:
    class Unfinished(interface):
        pass

    tokens = random_tokens([(2, 2)])
    query = torch.zeros(1, 3, 8)
    with pytest.raises(NotImplementedError, match="Unfinished does not define forward"):
        Unfinished()(query, query, torch.zeros(1, 3, 4), tokens, query)
