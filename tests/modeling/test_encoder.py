"""Encoder layers, and which tokens a stack of them updates and looks at."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_detr.modeling.attention import (
    DeformableEncoderAttention,
    DenseEncoderAttention,
    EncoderAttention,
    ObjectSelfAttention,
    SelfAttention,
)
from efficient_detr.modeling.encoder import (
    CarriedTokens,
    CurrentValues,
    DualAttentionEncoderLayer,
    EncoderLayer,
    InitialValues,
    PreNormEncoderLayer,
    RegatheredTokens,
    TransformerEncoder,
)
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.selection import LogitProductScore
from efficient_detr.structures import ActiveTokens, FeatureTokens, TokenSelection
from tests.tiny_models import random_tokens, randomised, torch_attention

SHAPES = [(3, 4), (2, 2)]  # 16 tokens


class MeanAttention(EncoderAttention):
    """Every token gets the mean of the memory; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, FeatureTokens, Tensor]] = []

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: FeatureTokens,
        padding_mask: Tensor,
    ) -> Tensor:
        self.calls.append((query, position, reference_points, memory, padding_mask))
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
    active = tokens.gather(torch.tensor([[5, 2]]), torch.tensor([2]))
    layer(active, tokens)
    ((query, position, reference_points, memory, padding_mask),) = layer.attention.calls
    assert query is active.features and position is active.positions
    assert reference_points is active.reference_points and memory is tokens
    assert padding_mask is active.padding_mask


def test_dual_layer_enhances_objects_first() -> None:
    layer, tokens = dual_layer(), random_tokens(SHAPES)
    active = dataclasses.replace(tokens.all_active(), object_scores=torch.randn(1, 16))
    assert active.object_scores is not None
    enhanced = layer.object_attention(active.features, active.positions, active.object_scores)
    expected = EncoderLayer.forward(layer, tokens.with_features(enhanced).all_active(), tokens)
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
        encoder.layers[0](tokens.gather(selection.indices[0], selection.counts), tokens),
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


def dense_layer(family: type[EncoderLayer]) -> Any:
    return randomised(
        family(
            attention=DenseEncoderAttention(channels=8, num_heads=2),
            feedforward=FeedForward(channels=8, hidden_channels=12),
            channels=8,
        )
    )


def norm_by_hand(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-5), scaled and shifted."""
    centered = x - x.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    return centered / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def branches_by_hand(layer: Any, tokens: FeatureTokens) -> tuple[Any, Any]:
    """What the attention and the network of a dense layer add to features (B, S, 8)."""
    attention, network = torch_attention(layer.attention), layer.feedforward

    def attend(x: Tensor) -> Tensor:
        located = x + tokens.positions
        return attention(located, located, x, key_padding_mask=tokens.padding_mask)[0]

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, network.expand.weight, network.expand.bias).clamp(min=0)
        return F.linear(hidden, network.contract.weight, network.contract.bias)

    return attend, feed


def test_post_norm_layer_in_plain_torch() -> None:
    """x = N1(x + A(x)), then N2(x + F(x))."""
    layer, tokens = dense_layer(EncoderLayer), random_tokens(SHAPES, sizes=[(24, 32), (16, 20)])
    attend, feed = branches_by_hand(layer, tokens)
    x = norm_by_hand(tokens.features + attend(tokens.features), layer.attention_norm)
    x = norm_by_hand(x + feed(x), layer.feedforward_norm)
    output = layer(tokens.all_active(), tokens)
    torch.testing.assert_close(output, x, rtol=1e-4, atol=1e-5)


def test_pre_norm_layer_in_plain_torch() -> None:
    """x = x + A(N1(x)), then x + F(N2(x)); queries, keys and values are all normed by N1."""
    layer = dense_layer(PreNormEncoderLayer)
    tokens = random_tokens(SHAPES, sizes=[(24, 32), (16, 20)])
    attend, feed = branches_by_hand(layer, tokens)
    x = tokens.features + attend(norm_by_hand(tokens.features, layer.attention_norm))
    x = x + feed(norm_by_hand(x, layer.feedforward_norm))
    output = layer(tokens.all_active(), tokens)
    torch.testing.assert_close(output, x, rtol=1e-4, atol=1e-5)


def test_pre_norm_layer_norms_the_memory_that_it_is_given() -> None:
    """With a selection the memory holds other tokens than the active ones."""
    layer = dense_layer(PreNormEncoderLayer)
    layer.attention = MeanAttention()
    tokens, other = random_tokens(SHAPES), random_tokens(SHAPES)
    active = tokens.gather(torch.tensor([[5, 2]]), torch.tensor([2]))
    layer(active, other)
    query, position, _, memory, _ = layer.attention.calls[0]
    torch.testing.assert_close(query, layer.attention_norm(tokens.features[:, [5, 2]]))
    torch.testing.assert_close(memory.features, layer.attention_norm(other.features))
    assert torch.equal(position, tokens.positions[:, [5, 2]])
    assert memory.positions is other.positions


@pytest.mark.parametrize("selects", [False, True])
def test_the_norm_of_the_encoder_is_for_all_tokens(selects: bool) -> None:
    """Also for those that no layer updates; the layers themselves do not see it."""
    tokens = random_tokens(SHAPES, batch=2)
    layers = [plain_layer(), plain_layer()]
    norm = randomised(nn.LayerNorm(8))
    chosen = [[[3, 8], [0, 1]], [[3], [0]]]
    selection = selection_of(*chosen, counts=[2, 2]) if selects else None
    raw = TransformerEncoder(layers=layers)(tokens, selection, None)
    output = TransformerEncoder(layers=layers, norm=norm)(tokens, selection, None)
    expected = norm_by_hand(raw.memory.features, norm)
    torch.testing.assert_close(output.memory.features, expected, rtol=1e-4, atol=1e-5)
    assert output.selection is selection
    for ours, theirs in zip(output.layer_features, raw.layer_features, strict=True):
        assert torch.equal(ours, theirs)


def test_layer_features_are_those_of_the_selected_tokens() -> None:
    tokens = random_tokens(SHAPES, batch=2)
    selection = selection_of([[3, 8, 15], [0, 1, 2]], [[3, 8], [0, 1]], counts=[3, 2])
    encoder = TransformerEncoder(layers=[plain_layer(), plain_layer()])
    output = encoder(tokens, selection, None)
    assert [tuple(f.shape) for f in output.layer_features] == [(2, 3, 8), (2, 2, 8)]
    assert torch.equal(output.memory.features[0, [3, 8]], output.layer_features[1][0])
    assert torch.equal(output.memory.features[0, 15], output.layer_features[0][0, 2])
    assert encoder(tokens, None, None).layer_features == []


def features_seen(token_source: RegatheredTokens | None, selection: TokenSelection) -> Any:
    """Encoder output, and the active features of both layers."""
    torch.manual_seed(1)
    tokens = random_tokens(SHAPES, batch=2)
    encoder: Any = TransformerEncoder(
        layers=[plain_layer(), plain_layer()], token_source=token_source
    )
    output = encoder(tokens, selection, None)
    return tokens, output, [layer.attention.calls[0][0] for layer in encoder.layers]


def test_carried_tokens_differ_from_regathered_ones_on_fillers() -> None:
    """Image 1 owns one row of two; token 1 fills up its second.

    Regathered, the filler starts every layer as it was; carried, it goes on from the layer before.
    """
    chosen = [[3, 8], [0, 1]]
    selection = selection_of(chosen, chosen, counts=[2, 1])
    tokens, regathered, seen = features_seen(RegatheredTokens(), selection)
    assert torch.equal(seen[1][1, 1], tokens.features[1, 1])
    _, carried, seen_carried = features_seen(CarriedTokens(), selection)
    assert torch.equal(seen_carried[0], seen[0])
    assert torch.equal(seen_carried[1], carried.layer_features[0])
    assert not torch.equal(seen_carried[1][1, 1], tokens.features[1, 1])
    # Rows that belong to an image are the same, and fillers never reach the memory.
    torch.testing.assert_close(seen_carried[1][0], seen[1][0])
    torch.testing.assert_close(seen_carried[1][1, 0], seen[1][1, 0])
    torch.testing.assert_close(carried.memory.features, regathered.memory.features)
    assert torch.equal(carried.memory.features[1, 1], tokens.features[1, 1])
    # What the encoder heads read differs on the filler alone.
    same = (carried.layer_features[1] == regathered.layer_features[1]).all(-1)
    assert same.tolist() == [[True, True], [True, False]]


def test_regathered_tokens_are_the_default() -> None:
    chosen = [[3, 8], [0, 1]]
    selection = selection_of(chosen, chosen, counts=[2, 1])
    _, expected, _ = features_seen(RegatheredTokens(), selection)
    _, output, _ = features_seen(None, selection)
    for ours, theirs in zip(output.layer_features, expected.layer_features, strict=True):
        assert torch.equal(ours, theirs)


def test_carried_tokens_of_a_shrinking_selection() -> None:
    """Layers keep prefixes of one ranking, so each takes the leading rows of the layer before."""
    selection = selection_of([[3, 8, 15], [0, 1, 2]], [[3, 8], [0, 1]], counts=[3, 1])
    _, output, seen = features_seen(CarriedTokens(), selection)
    assert torch.equal(seen[1], output.layer_features[0][:, :2])


def test_dropout_of_a_pre_norm_layer_only_in_training() -> None:
    layer = dense_layer(PreNormEncoderLayer)
    layer.dropout.p = 0.5
    tokens = random_tokens(SHAPES)
    first, second = (layer(tokens.all_active(), tokens) for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    first, second = (layer(tokens.all_active(), tokens) for _ in range(2))
    assert torch.equal(first, second)
