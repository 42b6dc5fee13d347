"""Decoder: query positions, refinement, look-forward-twice, isolation of denoising groups."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efficient_detr.boxes import inverse_sigmoid
from efficient_detr.errors import ConfigError
from efficient_detr.modeling.attention import (
    DeformableDecoderAttention,
    DenseDecoderAttention,
    SelfAttention,
)
from efficient_detr.modeling.decoder import (
    BoxQueryPosition,
    DecoderLayer,
    PreNormDecoderLayer,
    StoredQueryPosition,
    TransformerDecoder,
)
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.queries.denoising import denoising_mask
from efficient_detr.modeling.refinement import IterativeRefinement, LookForwardTwice
from efficient_detr.structures import DenoisingGroups, FeatureTokens, Queries
from tests.tiny_models import random_tokens, randomised, torch_attention, with_noise

SHAPES = [(4, 6), (2, 3)]


def layer(dropout: float = 0.0) -> DecoderLayer:
    return DecoderLayer(
        self_attention=SelfAttention(channels=8, num_heads=2),
        cross_attention=DeformableDecoderAttention(
            channels=8, num_heads=2, num_levels=2, num_points=2
        ),
        feedforward=FeedForward(channels=8, hidden_channels=12),
        channels=8,
        dropout=dropout,
    )


def decoder(num_layers: int = 3, *, generic: bool = True) -> TransformerDecoder:
    """With `generic`, all weights are away from their start, so that boxes really move."""
    module = TransformerDecoder(
        layers=[layer() for _ in range(num_layers)],
        heads=[PredictionHead(channels=8, num_classes=3) for _ in range(num_layers)],
        query_position=BoxQueryPosition(channels=8),
        refinement=LookForwardTwice(),
        norm=torch.nn.LayerNorm(8),
    )
    if generic:
        with_noise(module, 0.2)
    return module


def queries(batch: int = 2, number: int = 5) -> Queries:
    return Queries(
        content=torch.randn(batch, number, 8),
        reference_boxes=torch.rand(batch, number, 4) * 0.8 + 0.1,
    )


def test_layer_order() -> None:
    """Self-attention, cross-attention and network, each with residual, then norm."""
    module, tokens = layer(), random_tokens(SHAPES, batch=2)
    query, position, boxes = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2, 5, 4)
    x = module.self_attention_norm(query + module.self_attention(query, position))
    attended = module.cross_attention(x, position, boxes, tokens, query + position)
    x = module.cross_attention_norm(x + attended)
    x = module.feedforward_norm(x + module.feedforward(x))
    torch.testing.assert_close(module(query, position, boxes, tokens), x)


def test_query_position_is_seen_in_the_padded_frame_of_the_finest_level() -> None:
    """Image 1 fills half of the width and of the height of level 0: so does its box."""
    module = BoxQueryPosition(channels=8)
    tokens = random_tokens(SHAPES, sizes=[(32, 48), (16, 24)])
    box = torch.tensor([0.4, 0.6, 0.2, 0.8])
    positions = module(queries(2, 1), box.expand(2, 1, 4), tokens)
    assert positions.shape == (2, 1, 8)
    torch.testing.assert_close(positions[0, 0], module.projection(module.embedding(box)))
    torch.testing.assert_close(positions[1, 0], module.projection(module.embedding(box / 2)))


def test_query_position_starts_xavier_uniform() -> None:
    """From 2 C to C: within sqrt(6 / 3C), which is twice the bound of torch's default."""
    layers: Any = BoxQueryPosition(channels=32).projection.layers
    assert 0.9 < layers[0].weight.abs().max() / math.sqrt(6 / 96) <= 1


def test_shapes() -> None:
    output = decoder(3)(queries(), random_tokens(SHAPES, batch=2))
    assert output.logits.shape == (3, 2, 5, 3)
    assert output.boxes.shape == (3, 2, 5, 4)
    assert output.references.shape == (3, 2, 5, 4)
    for boxes in (output.boxes, output.references):
        assert (boxes > 0).all() and (boxes < 1).all()


def test_boxes_start_at_the_reference() -> None:
    """A fresh box head predicts no correction, so all layers keep the start boxes."""
    start = queries()
    output = decoder(3, generic=False)(start, random_tokens(SHAPES, batch=2))
    expected = start.reference_boxes.expand(3, 2, 5, 4)
    torch.testing.assert_close(output.boxes, expected)
    torch.testing.assert_close(output.references, expected)


def test_refinement_uses_raw_and_prediction_normed_features() -> None:
    module: Any = decoder(2)
    tokens, start = random_tokens(SHAPES, batch=2), queries()
    output = module(start, tokens)
    content, reference = start.content, start.reference_boxes
    for index, (block, head) in enumerate(zip(module.layers, module.heads, strict=True)):
        position = module.query_position(start, reference, tokens)
        content = block(content, position, reference, tokens)
        state = module.norm(content)
        box = (head.box_layers(state) + inverse_sigmoid(reference)).sigmoid()
        reference = (head.box_layers(content) + inverse_sigmoid(reference)).sigmoid()
        torch.testing.assert_close(output.logits[index], head.class_layer(state))
        torch.testing.assert_close(output.boxes[index], box)
        torch.testing.assert_close(output.references[index], reference)
    assert not torch.equal(output.boxes, output.references)


def gradient_at(value: Tensor, module: torch.nn.Module) -> float:
    """L1 norm of the gradient of the summed value at a module's parameters; 0 if there is none."""
    gradients = torch.autograd.grad(
        value.sum(), list(module.parameters()), retain_graph=True, allow_unused=True
    )
    return sum(g.abs().sum().item() for g in gradients if g is not None)


def test_look_forward_twice() -> None:
    """The box of layer i learns from the loss of layer i + 1, but from no later one.

    Layer i + 1 adds its correction to the reference that layer i made, with its gradient; what
    layer i + 1 sees and hands on comes from the same reference without its gradient.
    """
    module: Any = decoder(3)
    output = module(queries(), random_tokens(SHAPES, batch=2))
    boxes_of = [head.box_layers for head in module.heads]
    reached = [[gradient_at(output.boxes[i], boxes_of[j]) > 0 for j in range(3)] for i in range(3)]
    assert reached == [
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]
    assert not output.references.requires_grad, "what the layers look around"
    # Class logits see the references without gradient too.
    assert gradient_at(output.logits[2], boxes_of[0]) == 0
    assert gradient_at(output.logits[2], boxes_of[1]) == 0


def test_denoising_queries_do_not_leak() -> None:
    """Whatever the denoising queries hold, matching queries predict the same; groups likewise."""
    module, tokens = decoder(2), random_tokens(SHAPES)
    groups = DenoisingGroups(num_groups=2, slots=1)
    start = queries(batch=1, number=7)
    mask = denoising_mask(groups, start.content[:, 4:])
    output = module(dataclasses.replace(start, attention_mask=mask), tokens)
    content, boxes = start.content.clone(), start.reference_boxes.clone()
    content[:, :2] = torch.randn(1, 2, 8)
    boxes[:, :2] = torch.rand(1, 2, 4)
    changed = module(Queries(content, reference_boxes=boxes, attention_mask=mask), tokens)
    torch.testing.assert_close(output.logits[:, :, 2:], changed.logits[:, :, 2:])
    torch.testing.assert_close(output.boxes[:, :, 2:], changed.boxes[:, :, 2:])
    assert not torch.allclose(output.logits[:, :, :2], changed.logits[:, :, :2])
    alone = module(
        Queries(start.content[:, 4:], reference_boxes=start.reference_boxes[:, 4:]), tokens
    )
    torch.testing.assert_close(output.logits[:, :, 4:], alone.logits)


def test_every_parameter_gets_a_gradient() -> None:
    module = decoder(2)
    output = module(queries(), random_tokens(SHAPES, batch=2))
    (output.logits.square().sum() + output.boxes.square().sum()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("num_heads", [0, 2, 4])
def test_one_head_for_each_layer_or_for_all(num_heads: int) -> None:
    message = rf"decoder.heads has {num_heads} entries for 3 decoder.layers: .* a single one for"
    with pytest.raises(ConfigError, match=message):
        TransformerDecoder(
            layers=[layer(), layer(), layer()],
            heads=[PredictionHead(channels=8, num_classes=3) for _ in range(num_heads)],
            query_position=BoxQueryPosition(channels=8),
        )


def test_autocast_keeps_predictions_in_float32() -> None:
    """Boxes near to each other must stay apart: bfloat16 has steps of 1/256 below 1."""
    module, tokens, start = decoder(2), random_tokens(SHAPES, batch=2), queries()
    exact = module(start, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(start, tokens)
    assert output.boxes.dtype is torch.float32 and output.logits.dtype is torch.float32
    torch.testing.assert_close(output.boxes, exact.boxes, atol=0.05, rtol=0)
    assert math.isfinite(output.logits.sum().item())


def dense_layer(family: type[DecoderLayer]) -> Any:
    return randomised(
        family(
            self_attention=SelfAttention(channels=8, num_heads=2),
            cross_attention=DenseDecoderAttention(channels=8, num_heads=2),
            feedforward=FeedForward(channels=8, hidden_channels=12),
            channels=8,
        )
    )


def branches_by_hand(layer: Any, position: Tensor, memory: FeatureTokens, blocked: Tensor) -> Any:
    """What the three branches of a dense layer add to queries (B, Q, 8)."""
    among, across = torch_attention(layer.self_attention), torch_attention(layer.cross_attention)
    network = layer.feedforward

    def attend_queries(x: Tensor) -> Tensor:
        return among(x + position, x + position, x, attn_mask=blocked)[0]

    def attend_memory(x: Tensor) -> Tensor:
        keys, values = memory.features + memory.positions, memory.features
        return across(x + position, keys, values, key_padding_mask=memory.padding_mask)[0]

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, network.expand.weight, network.expand.bias).clamp(min=0)
        return F.linear(hidden, network.contract.weight, network.contract.bias)

    return attend_queries, attend_memory, feed


def norms_by_hand(layer: Any) -> Any:
    """(x - mean) / sqrt(variance + 1e-5), scaled and shifted, of the three norms."""

    def norm(module: torch.nn.LayerNorm) -> Any:
        def apply(x: Tensor) -> Tensor:
            centered = x - x.mean(-1, keepdim=True)
            scale = (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return centered / scale * module.weight + module.bias

        return apply

    return (
        norm(layer.self_attention_norm),
        norm(layer.cross_attention_norm),
        norm(layer.feedforward_norm),
    )


@pytest.mark.parametrize("family", [DecoderLayer, PreNormDecoderLayer])
def test_layers_in_plain_torch(family: type[DecoderLayer]) -> None:
    """Post-norm: x = N(x + branch(x)) three times; pre-norm: x = x + branch(N(x))."""
    layer = dense_layer(family)
    memory = random_tokens(SHAPES, sizes=[(32, 48), (16, 24)])
    x, position = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    blocked = torch.rand(5, 5) < 0.4
    blocked.fill_diagonal_(False)
    output = layer(x, position, None, memory, blocked)
    branches = branches_by_hand(layer, position, memory, blocked)
    for norm, branch in zip(norms_by_hand(layer), branches, strict=True):
        x = norm(x + branch(x)) if family is DecoderLayer else x + branch(norm(x))
    torch.testing.assert_close(output, x, rtol=1e-4, atol=1e-5)


class LayerInputs(DenseDecoderAttention):
    """Keeps what it is called with."""

    def forward(self, *arguments: Any) -> Tensor:
        self.seen = arguments
        return super().forward(*arguments)


@pytest.mark.parametrize("family", [DecoderLayer, PreNormDecoderLayer])
def test_the_attention_is_told_what_the_layer_got(family: type[DecoderLayer]) -> None:
    """Queries with positions before self-attention and norms, and the references as they are."""
    module = dense_layer(family)
    module.cross_attention = LayerInputs(channels=8, num_heads=2)
    query, position, points = torch.randn(1, 5, 8), torch.randn(1, 5, 8), torch.rand(1, 5, 2)
    memory = random_tokens(SHAPES)
    module(query, position, points, memory)
    attending, given, references, attended, layer_input = module.cross_attention.seen
    assert torch.equal(layer_input, query + position)
    assert given is position and references is points and attended is memory
    assert not torch.allclose(attending, query, atol=1e-2)


@pytest.mark.parametrize("family", [DecoderLayer, PreNormDecoderLayer])
def test_dropout_only_in_training(family: type[DecoderLayer]) -> None:
    module, memory = dense_layer(family), random_tokens(SHAPES)
    module.dropout.p = 0.5
    query = torch.randn(1, 5, 8)
    first, second = (module(query, query, None, memory) for _ in range(2))
    assert not torch.equal(first, second)
    module.eval()
    first, second = (module(query, query, None, memory) for _ in range(2))
    assert torch.equal(first, second)


def dense_decoder(
    family: type[DecoderLayer] = DecoderLayer, num_heads: int = 2, **parts: Any
) -> TransformerDecoder:
    """DETR's decoder: stored positions, no references."""
    common: dict[str, Any] = dict(
        layers=[dense_layer(family) for _ in range(2)],
        heads=[
            randomised(PredictionHead(channels=8, num_classes=3, background_classes=1))
            for _ in range(num_heads)
        ],
        query_position=StoredQueryPosition(),
    )
    return TransformerDecoder(**{**common, **parts})


def stored_queries() -> Queries:
    return Queries(content=torch.zeros(2, 5, 8), position=torch.randn(2, 5, 8))


@pytest.mark.parametrize("family", [DecoderLayer, PreNormDecoderLayer])
@pytest.mark.parametrize("normed", [False, True])
def test_decoder_without_references(family: type[DecoderLayer], normed: bool) -> None:
    """Heads predict boxes outright; the norm is for them alone, the layers get none of it."""
    norm = randomised(torch.nn.LayerNorm(8)) if normed else torch.nn.Identity()
    module: Any = dense_decoder(family, norm=norm if normed else None)
    given, memory = stored_queries(), random_tokens(SHAPES, batch=2)
    output = module(given, memory)
    assert output.references is None and output.token_attention is None
    content = given.content
    for index, (block, head) in enumerate(zip(module.layers, module.heads, strict=True)):
        content = block(content, given.position, None, memory)
        state = norm(content)
        torch.testing.assert_close(output.logits[index], head.class_layer(state))
        torch.testing.assert_close(output.boxes[index], head.box_layers(state).sigmoid())
    assert output.logits.shape == (2, 2, 5, 4)


def test_a_single_head_serves_all_layers() -> None:
    """One head predicts what two copies of it predict, and learns from both layers."""
    torch.manual_seed(2)
    shared: Any = dense_decoder(num_heads=1)
    given, memory = stored_queries(), random_tokens(SHAPES, batch=2)
    assert len(shared.heads) == 1 and shared.head(0) is shared.head(1)
    separate: Any = dense_decoder(layers=shared.layers)
    for head in separate.heads:
        head.load_state_dict(shared.heads[0].state_dict())
    output, expected = shared(given, memory), separate(given, memory)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.boxes, expected.boxes)
    expected.boxes.sum().backward()
    total = sum(head.box_layers.output.weight.grad for head in separate.heads)
    shared.zero_grad()
    output.boxes.sum().backward()
    torch.testing.assert_close(shared.heads[0].box_layers.output.weight.grad, total)


def test_stored_positions_serve_every_layer() -> None:
    module, seen = dense_decoder(), []
    for block in module.layers:
        block.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[1]))
    given = stored_queries()
    module(given, random_tokens(SHAPES, batch=2))
    assert len(seen) == 2 and all(position is given.position for position in seen)


def test_positions_that_are_not_there() -> None:
    memory = random_tokens(SHAPES)
    with pytest.raises(ConfigError, match=r"StoredQueryPosition needs queries with positions: use"):
        StoredQueryPosition()(Queries(torch.zeros(1, 5, 8)), None, memory)
    for references in (None, torch.rand(1, 5, 2)):
        with pytest.raises(ConfigError, match=r"BoxQueryPosition needs reference boxes"):
            BoxQueryPosition(channels=8)(Queries(torch.zeros(1, 5, 8)), references, memory)


class PredictedPoints(DeformableDecoderAttention):
    """The first two channels are the reference point, before the sigmoid."""

    def predict_reference_logits(self, layer_input: Tensor) -> Tensor:
        return layer_input[..., :2]

    @property
    def predicts_references(self) -> bool:
        return True


def predicting_decoder() -> Any:
    """The attention of the first of two layers predicts reference points."""

    def block(family: type[DeformableDecoderAttention]) -> DecoderLayer:
        module = layer()
        module.cross_attention = family(channels=8, num_heads=2, num_levels=2, num_points=2)
        return module

    return TransformerDecoder(
        layers=[block(PredictedPoints), block(DeformableDecoderAttention)],
        heads=[PredictionHead(channels=8, num_classes=3, box_bias=(-30.0, -30.0, 0.0, 0.0))],
        query_position=StoredQueryPosition(),
    )


def test_the_first_attention_predicts_references_where_the_queries_have_none() -> None:
    given = Queries(content=torch.randn(2, 5, 8), position=torch.randn(2, 5, 8))
    output = predicting_decoder()(given, random_tokens(SHAPES, batch=2))
    assert given.position is not None
    predicted = (given.content + given.position)[..., :2].sigmoid()
    torch.testing.assert_close(output.references, predicted.expand(2, 2, 5, 2))


def test_the_references_of_queries_come_first() -> None:
    given = dataclasses.replace(stored_queries(), reference_boxes=torch.rand(2, 5, 2))
    output = predicting_decoder()(given, random_tokens(SHAPES, batch=2))
    assert given.reference_boxes is not None
    assert torch.equal(output.references, given.reference_boxes.expand(2, 2, 5, 2))


def test_predicted_references_are_corrected_as_they_are() -> None:
    """Logits 30 and a correction of -30: in the middle. Through the bounded inverse, log 1e5."""
    given = Queries(content=torch.full((1, 1, 8), 30.0), position=torch.zeros(1, 1, 8))
    boxes = predicting_decoder()(given, random_tokens(SHAPES)).boxes
    torch.testing.assert_close(boxes, torch.full((2, 1, 1, 4), 0.5))


def mapping_decoder(family: type[DecoderLayer]) -> Any:
    def block() -> DecoderLayer:
        return family(
            self_attention=SelfAttention(channels=8, num_heads=2),
            cross_attention=DeformableDecoderAttention(
                channels=8, num_heads=2, num_levels=2, num_points=2
            ),
            feedforward=FeedForward(channels=8, hidden_channels=12),
            channels=8,
        )

    return randomised(
        TransformerDecoder(
            layers=[block(), block()],
            heads=[PredictionHead(channels=8, num_classes=3)],
            query_position=BoxQueryPosition(channels=8),
            refinement=IterativeRefinement(),
            map_token_attention=True,
        )
    )


@pytest.mark.parametrize("family", [DecoderLayer, PreNormDecoderLayer])
def test_token_attention_is_what_all_layers_pay(family: type[DecoderLayer]) -> None:
    """The sum of each layer's map, for the very queries that its cross-attention gets."""
    module, tokens = mapping_decoder(family), random_tokens(SHAPES, batch=2)
    calls: list[Any] = []
    for block in module.layers:
        block.cross_attention.register_forward_pre_hook(
            lambda attention, arguments: calls.append((attention, arguments[:4]))
        )
    output = module(queries(), tokens)
    assert output.token_attention.shape == (2, 30)
    expected = sum(attention.token_attention(*arguments) for attention, arguments in calls)
    torch.testing.assert_close(output.token_attention, expected)
    assert output.token_attention.sum() > 0 and not output.token_attention.requires_grad


def test_token_attention_is_mapped_in_training_only() -> None:
    module, tokens, start = mapping_decoder(DecoderLayer), random_tokens(SHAPES, batch=2), queries()
    mapped = module(start, tokens)
    module.eval()
    output = module(start, tokens)
    assert mapped.token_attention is not None and output.token_attention is None
    torch.testing.assert_close(output.boxes, mapped.boxes)
    assert decoder(2)(start, tokens).token_attention is None, "off unless it is asked for"


def test_token_attention_needs_deformable_attention() -> None:
    message = (
        r"decoder.map_token_attention needs deformable cross-attention, but decoder.layers.1 has "
        r"DenseDecoderAttention: use DeformableDecoderAttention or set map_token_attention=False"
    )
    with pytest.raises(ConfigError, match=message):
        dense_decoder(layers=[layer(), dense_layer(DecoderLayer)], map_token_attention=True)
