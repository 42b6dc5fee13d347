"""Predictions of the tokens that the encoder's layers updated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficient_detr.boxes import inverse_sigmoid
from efficient_detr.errors import ConfigError
from efficient_detr.modeling.encoder_heads import EncoderLayerHeads
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.queries import ProposalHead
from efficient_detr.modeling.selection import ForegroundScoreHead, SalientTokenSelector
from efficient_detr.structures import EncoderOutput, FeatureTokens, TokenSelection
from tests.tiny_models import random_tokens, with_noise

SHAPES = [(2, 4), (1, 2)]  # tokens 0 to 7 and 8 to 9


def prediction_head() -> PredictionHead:
    return PredictionHead(channels=8, num_classes=3)


def layer_heads(count: int) -> EncoderLayerHeads:
    return EncoderLayerHeads(heads=[prediction_head() for _ in range(count)])


def proposal_head() -> ProposalHead:
    return ProposalHead(channels=8, head=prediction_head())


def selection_of(indices: list[list[int]], counts: list[int], layers: int) -> TokenSelection:
    return TokenSelection(
        [torch.tensor(indices)] * layers, torch.tensor(counts), torch.zeros(len(counts), 10), []
    )


def encoded(tokens: FeatureTokens, selection: TokenSelection) -> tuple[EncoderOutput, list[Tensor]]:
    features = [torch.randn(*indices.shape, 8) for indices in selection.indices]
    return EncoderOutput(tokens, selection, features), features


def test_heads_start_at_the_boxes_of_the_selected_tokens() -> None:
    """A fresh head corrects nothing, so the boxes are the tokens' own.

    Token 6 is row 1, column 2 of 2 x 4: centre (0.625, 0.75), side 0.05. Token 8 is the first of
    1 x 2: centre (0.25, 0.5), side 0.1.
    """
    tokens, heads = random_tokens(SHAPES), layer_heads(1)
    output, _ = encoded(tokens, selection_of([[6, 8]], [2], layers=2))
    (prediction,) = heads(output, proposal_head(), tokens)
    expected = torch.tensor([[[0.625, 0.75, 0.05, 0.05], [0.25, 0.5, 0.1, 0.1]]])
    torch.testing.assert_close(prediction.boxes, expected)
    assert not prediction.class_agnostic


def test_each_layer_but_the_last_has_its_own_head() -> None:
    tokens, heads, proposals = random_tokens(SHAPES, batch=2), layer_heads(2), proposal_head()
    with_noise(heads, 0.3)
    selection = selection_of([[6, 8, 1], [0, 2, 9]], [3, 3], layers=3)
    output, features = encoded(tokens, selection)
    boxes, _ = proposals.proposal_boxes(tokens)
    start = torch.stack([boxes[0, [6, 8, 1]], boxes[1, [0, 2, 9]]])
    predictions = heads(output, proposals, tokens)
    assert len(predictions) == 2
    for head, layer, prediction in zip(heads.heads, features, predictions, strict=False):
        assert isinstance(head, PredictionHead)
        torch.testing.assert_close(prediction.logits, head.class_layer(layer))
        correction = head.box_layers(layer)
        expected = (correction + inverse_sigmoid(start, 1e-5)).sigmoid()
        torch.testing.assert_close(prediction.boxes, expected)


def test_fillers_on_padding_predict_the_whole_image_at_its_corner() -> None:
    """Padding has an infinite box logit, whatever the head corrects; its gradient is zero."""
    tokens = random_tokens(SHAPES, sizes=[(16, 32), (16, 16)])
    heads = layer_heads(1)
    assert tokens.padding_mask[1, 3]
    output, _ = encoded(tokens, selection_of([[6, 8], [0, 3]], [2, 1], layers=2))
    (prediction,) = heads(output, proposal_head(), tokens)
    assert prediction.boxes[1, 1].tolist() == [1, 1, 1, 1]
    prediction.boxes.sum().backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_an_encoder_of_another_length_is_refused() -> None:
    selection = SalientTokenSelector(score_head=ForegroundScoreHead(channels=8), num_layers=3)
    layer_heads(2).check_selection(selection)
    with pytest.raises(ConfigError, match="encoder_heads has 3 heads for 3 encoder.layers: give 2"):
        layer_heads(3).check_selection(selection)


def test_all_tokens_are_refused() -> None:
    tokens, heads = random_tokens(SHAPES), layer_heads(1)
    with pytest.raises(ConfigError, match=r"set detector.selection or remove encoder_heads"):
        heads.check_selection(None)
    with pytest.raises(ConfigError, match=r"set detector.selection or remove encoder_heads"):
        heads(EncoderOutput(tokens), proposal_head(), tokens)
