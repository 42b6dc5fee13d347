"""The detector as a whole: stages, gradients, padding, mixed precision, parts that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.detector import Detector
from efficient_detr.structures import DetectorOutput
from tests.tiny_models import (
    padding_mask,
    run_training,
    targets_of,
    tiny_model,
    total,
    use_unpadded_query_positions,
)

FAMILIES = ["dino", "focus_detr"]
BOXES = [[[0.4, 0.5, 0.3, 0.4], [0.7, 0.6, 0.2, 0.2]], [[0.5, 0.5, 0.9, 0.8]]]

both = pytest.mark.parametrize("family", FAMILIES)


@both
def test_children_are_in_order_of_execution(family: str) -> None:
    """FLOPs are reported by these stages."""
    names = [name for name, _ in tiny_model(family).detector.named_children()]
    expected = ["backbone", "neck", "tokenizer", "selection", "encoder", "proposals", "queries"]
    expected += ["denoising", "decoder"]
    if family == "dino":
        expected.remove("selection")
    assert names == expected


@both
def test_training_output(family: str) -> None:
    output, _ = run_training(tiny_model(family), targets_of(*BOXES))
    assert output.memory.spatial_shapes == [(8, 12), (4, 6), (2, 3), (1, 2)]
    # 6 // 2 = 3 groups of two slots.
    assert output.denoising_groups is not None and output.denoising is not None
    assert output.denoising_groups.num_queries == 2 * 3 * 2
    assert output.denoising.logits.shape == (2, 2, 12, 5)
    assert output.decoder.logits.shape == (2, 2, 12, 5)
    assert output.decoder.boxes.shape == (2, 2, 12, 4)
    assert output.proposal is not None and output.proposal.boxes.shape == (2, 12, 4)
    assert (output.selection is None) is (family == "dino")
    if output.selection is not None:
        # 128 tokens: int(64) + 1. The second image, 48 x 64 of 64 x 96 pixels: 6 x 8 + 3 x 4 +
        # 2 x 2 (rows 0, 32 are below 48; columns 0, 32 below 64) + 1 x 2 (columns 0, 48): 66.
        assert output.selection.counts.tolist() == [65, 34]
        assert output.selection.kept_tokens().tolist() == [[65, 34], [32, 32]]


@both
def test_evaluation_has_no_denoising(family: str) -> None:
    model = tiny_model(family).eval()
    output = model.detector(torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    assert output.denoising is None and output.denoising_groups is None
    assert output.decoder.logits.shape == (2, 1, 12, 5)
    assert torch.equal(output.prediction.boxes, output.decoder.boxes[-1])


@both
def test_every_parameter_gets_a_gradient(family: str) -> None:
    model = tiny_model(family)
    _, losses = run_training(model, targets_of(*BOXES))
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@both
def test_bfloat16_autocast(family: str) -> None:
    """Losses and gradients are finite, and near to those of single precision.

    Which tokens and proposals are selected depends on rounding, so the bound is wide.
    """
    model = tiny_model(family)
    state = torch.get_rng_state()
    _, exact = run_training(model, targets_of(*BOXES))
    torch.set_rng_state(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, losses = run_training(model, targets_of(*BOXES))
    assert losses.keys() == exact.keys()
    assert total(losses).item() == pytest.approx(total(exact).item(), rel=0.1)
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype is torch.float32, name


@both
def test_double_precision(family: str) -> None:
    """`.to(torch.float64)` runs in double precision from end to end, and agrees with single."""
    model = tiny_model(family).eval()
    images, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    with torch.no_grad():
        single = model.detector(images, mask)
        double = model.to(torch.float64).detector(images.double(), mask)
    assert double.prediction.boxes.dtype is torch.float64
    torch.testing.assert_close(
        single.prediction.boxes.double(), double.prediction.boxes, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        single.prediction.logits.double(), double.prediction.logits, atol=1e-3, rtol=0
    )


class StoredMaps(nn.Module):
    """Stands in for a neck: returns the maps it is given, whatever the backbone says."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        return self.maps


def detect(detector: Detector, maps: list[Tensor], sizes: list[tuple[int, int]]) -> DetectorOutput:
    """Run everything behind the neck on the given maps of unpadded images of the given sizes."""
    detector.neck = StoredMaps(maps)  # type: ignore[assignment]
    padded = (maps[0].shape[2] * 8, maps[0].shape[3] * 8)
    with torch.no_grad():
        return detector(torch.zeros(len(sizes), 3, *padded), padding_mask(sizes, padded))


def maps_of(height: int, width: int) -> list[Tensor]:
    return [torch.randn(1, 16, height // stride, width // stride) for stride in (8, 16, 32, 64)]


def padded_batch(images: list[list[Tensor]]) -> list[Tensor]:
    """Stack maps of different sizes, with noise on the padding."""
    batch = []
    for level in zip(*images, strict=True):
        size = [max(m.shape[dim] for m in level) for dim in (2, 3)]
        stacked = 10 * torch.randn(len(level), 16, *size)
        for image, feature_map in enumerate(level):
            stacked[image, :, : feature_map.shape[2], : feature_map.shape[3]] = feature_map[0]
        batch.append(stacked)
    return batch


def compare_with_images_alone(model: EfficientDETR, sizes: list[tuple[int, int]]) -> None:
    images = [maps_of(*size) for size in sizes]
    batched = detect(model.detector, padded_batch(images), sizes)
    for index, (maps, size) in enumerate(zip(images, sizes, strict=True)):
        alone = detect(model.detector, maps, [size])
        for name in ("logits", "boxes", "references"):
            torch.testing.assert_close(
                getattr(batched.decoder, name)[:, index],
                getattr(alone.decoder, name)[:, 0],
                atol=2e-5,
                rtol=1e-4,
            )
        assert batched.proposal is not None and alone.proposal is not None
        torch.testing.assert_close(batched.proposal.boxes[index], alone.proposal.boxes[0])


def test_dino_predicts_the_same_in_a_padded_batch_as_alone() -> None:
    """Given equal feature maps: what the padding holds must not matter.

    Left out are the backbone (convolutions that see the zeros at the border) and the neck (group
    norm over the padded map), where padding does make a small difference, as in all DETRs, and the
    padded frame of the query positions. The sizes are multiples of the coarsest stride; otherwise a
    cell may be half image, half padding.
    """
    model = tiny_model("dino").eval()
    use_unpadded_query_positions(model)
    compare_with_images_alone(model, [(128, 192), (64, 128), (128, 64)])


def test_padding_reaches_dino_through_the_query_positions_only() -> None:
    """The counterpart: the size of the batch matters, the content of its padding does not."""
    model, sizes = tiny_model("dino").eval(), [(64, 64), (128, 192)]
    images = [maps_of(*size) for size in sizes]
    first, second = (detect(model.detector, padded_batch(images), sizes) for _ in range(2))
    torch.testing.assert_close(first.prediction.boxes, second.prediction.boxes)
    alone = detect(model.detector, images[0], sizes[:1])
    assert first.proposal is not None and alone.proposal is not None
    torch.testing.assert_close(first.proposal.boxes[0], alone.proposal.boxes[0])
    assert not torch.allclose(first.prediction.boxes[0], alone.prediction.boxes[0], atol=1e-3)


def test_focus_detr_predicts_the_same_in_a_padded_batch_up_to_its_scores() -> None:
    """Two published traits let padding into the foreground scores; without them, all is equal.

    The score head takes the mean of a level over its padding too (here: the weights that read the
    mean are zeroed), and score maps are enlarged with the corners of the padded map aligned (here:
    the modulation is zeroed). Later layers keep a part of the largest image's tokens, so the images
    have equally many tokens here.
    """
    model = tiny_model("focus_detr").eval()
    use_unpadded_query_positions(model)
    selection: Any = model.detector.selection
    with torch.no_grad():
        selection.score_head.hidden[0].weight[:, 8:] = 0
        selection.modulation.zero_()
    compare_with_images_alone(model, [(128, 192), (192, 128)])


def test_padding_reaches_focus_detr_through_the_mean_of_a_level() -> None:
    """The counterpart: with the mean over the padded level, scores of image tokens change."""
    model = tiny_model("focus_detr").eval()
    assert model.detector.selection is not None
    with torch.no_grad():
        model.detector.selection.modulation.zero_()
    maps, sizes = maps_of(128, 128), [(128, 128), (128, 192)]
    alone = detect(model.detector, maps, sizes[:1]).selection
    batched = detect(model.detector, padded_batch([maps, maps_of(128, 192)]), sizes).selection
    assert alone is not None and batched is not None
    scores = alone.level_logits[0].unflatten(1, (16, 16))[0]
    scores_in_batch = batched.level_logits[0].unflatten(1, (16, 24))[0, :, :16]
    assert (scores - scores_in_batch).abs().mean() > 1e-3


def test_the_padding_mask_matters() -> None:
    model = tiny_model("dino").eval()
    maps = maps_of(128, 128)
    whole = detect(model.detector, maps, [(128, 128)])
    part = detect(model.detector, maps, [(128, 64)])
    assert not torch.allclose(whole.prediction.boxes, part.prediction.boxes, atol=1e-3)


def test_an_image_with_fewer_tokens_than_queries() -> None:
    """32 x 32 pixels have 16 + 4 + 1 + 1 = 22 tokens."""
    model = tiny_model("dino", num_queries=23).eval()
    with pytest.raises(ConfigError, match=r"22 tokens, fewer than queries.num_queries=23"):
        model.detector(torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool))


def test_tokenize_then_detect_is_forward() -> None:
    """The two halves of a pass: what the tokenizer gives is all that the second half reads."""
    model = tiny_model("dino").eval()
    mask = padding_mask([(64, 96), (48, 64)], (64, 96))
    images = torch.randn(2, 3, 64, 96).masked_fill(mask[:, None], 0)
    whole = model.detector(images, mask)
    tokens = model.detector.tokenize(images, mask)
    assert tokens.spatial_shapes == [(8, 12), (4, 6), (2, 3), (1, 2)]
    assert tokens.image_sizes.tolist() == [[96, 64], [64, 48]]
    maps = model.detector.neck(model.detector.backbone(images))
    for level, feature_map in enumerate(maps):
        assert torch.equal(tokens.level(level), feature_map)
    output = model.detector.detect(tokens)
    assert torch.equal(output.prediction.boxes, whole.prediction.boxes)
    assert torch.equal(output.prediction.logits, whole.prediction.logits)


def test_detect_makes_denoising_queries_from_targets() -> None:
    model = tiny_model("dino")
    mask = padding_mask([(64, 96), (48, 64)], (64, 96))
    tokens = model.detector.tokenize(torch.randn(2, 3, 64, 96), mask)
    assert model.detector.detect(tokens).denoising is None
    output = model.detector.detect(tokens, targets_of(*BOXES))
    assert output.denoising is not None and output.denoising.logits.shape == (2, 2, 12, 5)


@both
def test_the_memory_is_what_the_encoder_returned(family: str) -> None:
    model = tiny_model(family).eval()
    seen: list[Any] = []
    model.detector.encoder.register_forward_hook(lambda _m, _args, result: seen.append(result))
    output = model.detector(torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    assert output.memory is seen[0].memory and output.selection is seen[0].selection
    assert output.encoder_layers == []
