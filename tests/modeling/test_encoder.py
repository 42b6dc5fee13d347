"""Encoder layers, and which tokens a stack of them updates and looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.modeling.attention import (
    DeformableEncoderAttention,
    EncoderAttention,
    ObjectSelfAttention,
    SelfAttention,
)
from efficient_detr.modeling.encoder import (
    CurrentValues,
    DualAttentionEncoderLayer,
    EncoderLayer,
    InitialValues,
    TransformerEncoder,
)
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.selection import LogitProductScore
from efficient_detr.structures import ActiveTokens, FeatureTokens, TokenSelection
from tests.tiny_models import random_tokens

SHAPES = [(3, 4), (2, 2)]  # 16 tokens


class MeanAttention(EncoderAttention):
    """Every token gets the mean of the memory; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, FeatureTokens]] = []

    def forward(
        self, query: Tensor, position: Tensor, reference_points: Tensor, memory: FeatureTokens
    ) -> Tensor:
        self.calls.append((query, position, reference_points, memory))
        return memory.features.mean(1, keepdim=True).expand_as(query)


def plain_layer() -> EncoderLayer:
    return EncoderLayer(
        attention=MeanAttention(),
        feedforward=FeedForward(channels=8, hidden_channels=12),
        channels=8,
    )


def dual_layer(num_tokens: int = 3) -> DualAttentionEncoderLayer:
    return DualAttentionEncoderLayer(
        object_attention=ObjectSelfAttention(
            attention=SelfAttention(channels=8, num_heads=2), channels=8, num_tokens=num_tokens
        ),
        attention=MeanAttention(),
        feedforward=FeedForward(channels=8, hidden_channels=12),
        channels=8,
    )


def selection_of(*indices: list[list[int]], counts: list[int]) -> TokenSelection:
    return TokenSelection(
        indices=[torch.tensor(layer) for layer in indices],
        counts=torch.tensor(counts),
        scores=torch.randn(len(counts), 16),
        level_logits=[],
    )


def test_layer_is_post_norm() -> None:
    layer, tokens = plain_layer(), random_tokens(SHAPES, batch=2)
    x = tokens.features
    x = layer.attention_norm(x + x.mean(1, keepdim=True))
    x = layer.feedforward_norm(x + layer.feedforward(x))
    torch.testing.assert_close(layer(tokens.all_active(), tokens), x)


def test_layer_hands_positions_and_reference_points_to_the_attention() -> None:
    layer: Any = plain_layer()
    tokens = random_tokens(SHAPES)
    active = tokens.gather(torch.tensor([[5, 2]]))
    layer(active, tokens)
    ((query, position, reference_points, memory),) = layer.attention.calls
    assert query is active.features and position is active.positions
    assert reference_points is active.reference_points and memory is tokens


def test_dual_layer_enhances_objects_first() -> None:
    layer, tokens = dual_layer(), random_tokens(SHAPES)
    active = ActiveTokens(
        tokens.features, tokens.positions, tokens.reference_points, None, torch.randn(1, 16)
    )
    enhanced = layer.object_attention(active.features, active.positions, active.object_scores)
    expected = EncoderLayer.forward(
        layer, ActiveTokens(enhanced, tokens.positions, tokens.reference_points), tokens
    )
    torch.testing.assert_close(layer(active, tokens), expected)
    assert not torch.equal(enhanced, active.features)


def test_dual_layer_needs_object_scores() -> None:
    tokens = random_tokens(SHAPES)
    with pytest.raises(ValueError, match="give the encoder an object_score"):
        dual_layer()(tokens.all_active(), tokens)


def test_all_tokens_are_updated_without_a_selection() -> None:
    tokens = random_tokens(SHAPES, batch=2)
    encoder = TransformerEncoder(layers=[plain_layer(), plain_layer()])
    output = encoder(tokens, None, None)
    expected = tokens
    for layer in encoder.layers:
        expected = expected.with_features(layer(expected.all_active(), expected))
    torch.testing.assert_close(output.memory.features, expected.features)
    assert output.selection is None


def test_only_selected_tokens_are_updated() -> None:
    """Image 1 may use two rows: the third of its first layer is a filler."""
    tokens = random_tokens(SHAPES, batch=2)
    selection = selection_of([[3, 8, 15], [0, 1, 2]], [[3, 8], [0, 1]], counts=[3, 2])
    encoder = TransformerEncoder(layers=[plain_layer(), plain_layer()])
    output = encoder(tokens, selection, None)
    changed = (output.memory.features != tokens.features).any(-1)
    assert changed.nonzero().tolist() == [[0, 3], [0, 8], [0, 15], [1, 0], [1, 1]]
    # Token 15 was updated once, tokens 3 and 8 twice.
    first = tokens.scatter(
        selection.indices[0],
        encoder.layers[0](tokens.gather(selection.indices[0]), tokens),
        selection.counts,
    )
    torch.testing.assert_close(output.memory.features[0, 15], first.features[0, 15])
    assert not torch.equal(output.memory.features[0, 3], first.features[0, 3])
    assert output.selection is selection


@pytest.mark.parametrize("values", [CurrentValues(), InitialValues(), None])
def test_what_the_layers_look_at(values: Any) -> None:
    tokens = random_tokens(SHAPES)
    encoder: Any = TransformerEncoder(layers=[plain_layer(), plain_layer()], value_source=values)
    encoder(tokens, selection_of([[3, 8]], [[3, 8]], counts=[2]), None)
    first, second = (layer.attention.calls[0] for layer in encoder.layers)
    assert first[3].features is tokens.features
    assert torch.equal(second[3].features, tokens.features) is isinstance(values, InitialValues)
    # The queries of the second layer are updated in either case.
    assert not torch.equal(second[0], first[0])


def test_object_scores_multiply_class_and_foreground_logits_of_the_active_tokens() -> None:
    tokens, head = random_tokens(SHAPES), PredictionHead(channels=8, num_classes=4)
    selection = selection_of([[3, 8, 1, 0]], counts=[4])
    layer = dual_layer(num_tokens=2)
    encoder = TransformerEncoder(layers=[layer], object_score=LogitProductScore())
    seen: list[ActiveTokens] = []
    layer.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    encoder(tokens, selection, head)
    chosen = [3, 8, 1, 0]
    classes = head.classify(tokens.features[:, chosen])
    assert seen[0].foreground_logits is not None and seen[0].object_scores is not None
    assert torch.equal(seen[0].foreground_logits, selection.scores[:, chosen])
    torch.testing.assert_close(
        seen[0].object_scores, classes.amax(-1) * selection.scores[:, chosen]
    )


def test_every_parameter_gets_a_gradient() -> None:
    def layer() -> DualAttentionEncoderLayer:
        return DualAttentionEncoderLayer(
            object_attention=ObjectSelfAttention(
                attention=SelfAttention(channels=8, num_heads=2), channels=8, num_tokens=3
            ),
            attention=DeformableEncoderAttention(
                channels=8, num_heads=2, num_levels=2, num_points=2
            ),
            feedforward=FeedForward(channels=8, hidden_channels=12),
            channels=8,
        )

    encoder = TransformerEncoder(
        layers=[layer(), layer()], value_source=InitialValues(), object_score=LogitProductScore()
    )
    tokens = random_tokens(SHAPES)
    selection = selection_of([list(range(10))], [list(range(5))], counts=[10])
    output = encoder(tokens, selection, PredictionHead(channels=8, num_classes=4))
    (output.memory.features * torch.randn(1, 16, 8)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        # Adding a constant to all keys shifts the logits of a softmax alike.
        if not name.endswith("in_proj_bias"):
            assert parameter.grad.abs().sum() > 0, name


def test_dropout_only_in_training() -> None:
    layer = EncoderLayer(
        attention=MeanAttention(),
        feedforward=FeedForward(channels=8, hidden_channels=12),
        channels=8,
        dropout=0.5,
    )
    tokens = random_tokens(SHAPES)
    assert not torch.equal(layer(tokens.all_active(), tokens), layer(tokens.all_active(), tokens))
    layer.eval()
    assert torch.equal(layer(tokens.all_active(), tokens), layer(tokens.all_active(), tokens))
