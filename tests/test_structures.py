"""Tokens: cutting by level, gathering, scattering with counts; slices of decoder outputs."""

from __future__ import annotations

import torch

from efficient_detr.structures import (
    DecoderOutput,
    DenoisingGroups,
    DetectorOutput,
    SetPrediction,
    TokenSelection,
    gather_tokens,
)
from tests.tiny_models import random_tokens

SHAPES = [(3, 5), (2, 3), (1, 2)]  # 15 + 6 + 2 = 23 tokens


def test_split_and_level() -> None:
    tokens = random_tokens(SHAPES, batch=2, channels=4)
    assert tokens.level_sizes == [15, 6, 2]
    assert [t.shape for t in tokens.split()] == [(2, 15, 4), (2, 6, 4), (2, 2, 4)]
    assert [t.shape for t in tokens.split(tokens.padding_mask)] == [(2, 15), (2, 6), (2, 2)]
    assert tokens.level(1).shape == (2, 4, 2, 3)
    # Row-major: row 1, column 2 of the second level is token 15 + 1 * 3 + 2.
    assert torch.equal(tokens.level(1)[:, :, 1, 2], tokens.features[:, 20])


def test_gather_follows_the_indices() -> None:
    tokens = random_tokens(SHAPES, batch=2, channels=4)
    indices = torch.tensor([[22, 0, 7], [1, 1, 14]])
    active = tokens.gather(indices, torch.tensor([3, 3]))
    for image in range(2):
        for row, index in enumerate(indices[image].tolist()):
            assert torch.equal(active.features[image, row], tokens.features[image, index])
            assert torch.equal(active.positions[image, row], tokens.positions[image, index])
            points = tokens.reference_points[image, index]
            assert torch.equal(active.reference_points[image, row], points)
    assert active.foreground_logits is None and active.object_scores is None
    everything = tokens.all_active()
    assert everything.features is tokens.features


def test_gather_tokens_keeps_trailing_dimensions() -> None:
    tensor = torch.randn(2, 6, 3, 2)
    indices = torch.tensor([[5, 1], [0, 2]])
    assert gather_tokens(tensor, indices).shape == (2, 2, 3, 2)
    assert torch.equal(gather_tokens(tensor, indices)[0, 0], tensor[0, 5])
    flat = torch.arange(12).reshape(2, 6)
    assert gather_tokens(flat, indices).tolist() == [[5, 1], [6, 8]]


def test_scatter_writes_the_leading_rows_only() -> None:
    tokens = random_tokens(SHAPES, batch=3, channels=4)
    indices = torch.stack([torch.randperm(23)[:6] for _ in range(3)])
    new = torch.full((3, 6, 4), 100.0)
    written = tokens.scatter(indices, new, torch.tensor([6, 2, 0]))
    for image, count in enumerate([6, 2, 0]):
        expected = tokens.features[image].clone()
        expected[indices[image, :count]] = 100.0
        assert torch.equal(written.features[image], expected)
    assert written.positions is tokens.positions


def test_scatter_gives_gradient_to_kept_rows_and_untouched_tokens() -> None:
    tokens = random_tokens(SHAPES, batch=1, channels=4)
    old = tokens.features.clone().requires_grad_()
    new = torch.zeros(1, 3, 4, requires_grad=True)
    indices = torch.tensor([[4, 9, 2]])
    tokens.with_features(old).scatter(indices, new, torch.tensor([2])).features.sum().backward()
    assert new.grad is not None and old.grad is not None
    assert new.grad[0, :, 0].tolist() == [1, 1, 0]
    overwritten = {4, 9}
    assert old.grad[0, :, 0].tolist() == [0.0 if i in overwritten else 1.0 for i in range(23)]


def test_scatter_keeps_the_dtype_of_the_tokens() -> None:
    tokens = random_tokens(SHAPES, batch=1, channels=4)
    new = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    written = tokens.scatter(torch.tensor([[0, 1]]), new, torch.tensor([2]))
    assert written.features.dtype is torch.float32
    assert written.features[0, :2].eq(1).all()


def test_kept_tokens() -> None:
    selection = TokenSelection(
        indices=[torch.zeros(2, n, dtype=torch.long) for n in (10, 6, 3)],
        counts=torch.tensor([10, 4]),
        scores=torch.zeros(2, 23),
        level_logits=[],
    )
    # The second image has 4 tokens: more than the last layer takes, fewer than the others do.
    assert selection.kept_tokens().tolist() == [[10, 4], [6, 4], [3, 3]]


def test_decoder_output_slices() -> None:
    fields = [torch.randn(2, 1, 5, n) for n in (3, 4, 4)]
    output = DecoderOutput(*fields)
    first, rest = output.queries(slice(2)), output.queries(slice(2, None))
    assert torch.equal(torch.cat([first.logits, rest.logits], dim=2), fields[0])
    assert torch.equal(torch.cat([first.boxes, rest.boxes], dim=2), fields[1])
    assert first.references is not None
    assert torch.equal(first.references, fields[2][:, :, :2])
    assert torch.equal(output.layer(0).boxes, fields[1][0])
    last = DetectorOutput(decoder=output, memory=random_tokens(SHAPES)).prediction
    assert torch.equal(last.logits, fields[0][1])
    assert torch.equal(last.boxes, fields[1][1])


def test_number_of_denoising_queries() -> None:
    assert DenoisingGroups(num_groups=3, slots=4).num_queries == 24
    assert DenoisingGroups(num_groups=1, slots=0).num_queries == 0


def test_gather_marks_padding_and_fillers() -> None:
    """Image 0 owns two of three rows, one of which is padding; all rows of image 1 are its own."""
    tokens = random_tokens([(2, 3)], sizes=[(16, 16), (16, 24)], channels=4)
    assert tokens.padding_mask[0].tolist() == [False, False, True, False, False, True]
    active = tokens.gather(torch.tensor([[0, 2, 1], [2, 4, 0]]), torch.tensor([2, 3]))
    assert active.padding_mask.tolist() == [[False, True, True], [False, False, False]]


def test_all_active_tokens() -> None:
    tokens = random_tokens(SHAPES, batch=2, channels=4)
    active = tokens.all_active()
    assert active.positions is tokens.positions and active.padding_mask is tokens.padding_mask
    assert active.reference_points is tokens.reference_points


def test_decoder_output_without_references() -> None:
    logits, boxes, attention = torch.randn(2, 3, 5, 4), torch.rand(2, 3, 5, 4), torch.rand(3, 23)
    output = DecoderOutput(logits, boxes, token_attention=attention)
    rest = output.queries(slice(2, None))
    assert rest.references is None and rest.logits.shape == (2, 3, 3, 4)
    assert rest.token_attention is attention, "the attention that all queries pay"
    assert output.queries(slice(0)).boxes.shape == (2, 3, 0, 4)
    assert not output.layer(-1).class_agnostic
    assert torch.equal(output.layer(-1).logits, logits[1])


def test_detector_output_of_a_model_without_extras() -> None:
    output = DetectorOutput(
        decoder=DecoderOutput(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)),
        memory=random_tokens(SHAPES),
    )
    assert output.proposal is None and output.denoising is None and output.selection is None
    assert output.encoder_layers == [] and output.student is None
    assert isinstance(output.prediction, SetPrediction)
    assert output.prediction.boxes.shape == (2, 3, 4)
