"""Decoder: query positions, refinement, look-forward-twice, isolation of denoising groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.boxes import inverse_sigmoid
from efficient_detr.modeling.attention import DeformableDecoderAttention, SelfAttention
from efficient_detr.modeling.decoder import BoxQueryPosition, DecoderLayer, TransformerDecoder
from efficient_detr.modeling.heads import PredictionHead
from efficient_detr.modeling.layers import FeedForward
from efficient_detr.modeling.queries.denoising import denoising_mask
from efficient_detr.structures import DenoisingGroups, Queries
from tests.tiny_models import random_tokens

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
        channels=8,
    )
    if generic:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def queries(batch: int = 2, number: int = 5) -> Queries:
    return Queries(torch.randn(batch, number, 8), torch.rand(batch, number, 4) * 0.8 + 0.1)


def test_layer_order() -> None:
    """Self-attention, cross-attention and network, each with residual, then norm."""
    module, tokens = layer(), random_tokens(SHAPES, batch=2)
    query, position, boxes = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2, 5, 4)
    x = module.self_attention_norm(query + module.self_attention(query, position))
    x = module.cross_attention_norm(x + module.cross_attention(x, position, boxes, tokens))
    x = module.feedforward_norm(x + module.feedforward(x))
    torch.testing.assert_close(module(query, position, boxes, tokens), x)


def test_query_position_is_seen_in_the_padded_frame_of_the_finest_level() -> None:
    """Image 1 fills half of the width and of the height of level 0: so does its box."""
    module = BoxQueryPosition(channels=8)
    tokens = random_tokens(SHAPES, sizes=[(32, 48), (16, 24)])
    box = torch.tensor([0.4, 0.6, 0.2, 0.8])
    positions = module(box.expand(2, 1, 4), tokens)
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
        content = block(content, module.query_position(reference, tokens), reference, tokens)
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
    handed_on = [
        [gradient_at(output.references[i], boxes_of[j]) > 0 for j in range(3)] for i in range(3)
    ]
    assert handed_on == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    # Class logits see the references without gradient too.
    assert gradient_at(output.logits[2], boxes_of[0]) == 0
    assert gradient_at(output.logits[2], boxes_of[1]) == 0


def test_denoising_queries_do_not_leak() -> None:
    """Whatever the denoising queries hold, matching queries predict the same; groups likewise."""
    module, tokens = decoder(2), random_tokens(SHAPES)
    groups = DenoisingGroups(num_groups=2, slots=1)
    start = queries(batch=1, number=7)
    mask = denoising_mask(groups, start.content[:, 4:])
    output = module(Queries(start.content, start.reference_boxes, mask), tokens)
    content, boxes = start.content.clone(), start.reference_boxes.clone()
    content[:, :2] = torch.randn(1, 2, 8)
    boxes[:, :2] = torch.rand(1, 2, 4)
    changed = module(Queries(content, boxes, mask), tokens)
    torch.testing.assert_close(output.logits[:, :, 2:], changed.logits[:, :, 2:])
    torch.testing.assert_close(output.boxes[:, :, 2:], changed.boxes[:, :, 2:])
    assert not torch.allclose(output.logits[:, :, :2], changed.logits[:, :, :2])
    alone = module(Queries(start.content[:, 4:], start.reference_boxes[:, 4:]), tokens)
    torch.testing.assert_close(output.logits[:, :, 4:], alone.logits)


def test_every_parameter_gets_a_gradient() -> None:
    module = decoder(2)
    output = module(queries(), random_tokens(SHAPES, batch=2))
    (output.logits.square().sum() + output.boxes.square().sum()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_one_head_for_each_layer() -> None:
    with pytest.raises(ValueError, match=r"decoder.heads has 1 entries for 2 decoder.layers"):
        TransformerDecoder(
            layers=[layer(), layer()],
            heads=[PredictionHead(channels=8, num_classes=3)],
            query_position=BoxQueryPosition(channels=8),
            channels=8,
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
