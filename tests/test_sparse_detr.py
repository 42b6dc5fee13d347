"""Sparse DETR as a whole: its losses, what learns, and what the padding of a batch changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention import DenseDecoderAttention
from efficient_detr.modeling.queries import BoxEmbeddedQueries, FirstClassScore
from efficient_detr.structures import DetectorOutput, Targets
from tests.tiny_models import (
    MODELS,
    PatchBackbone,
    padding_mask,
    run_training,
    targets_of,
    total,
    with_noise,
)

SIZES: dict[str, Any] = dict(
    in_channels=[8, 12, 16],
    num_classes=5,
    channels=16,
    num_heads=2,
    encoder_points=2,
    decoder_points=3,
    hidden_channels=24,
    encoder_layers=3,
    decoder_layers=2,
    num_queries=12,
    num_groups=4,
    dropout=0.0,
)
BOXES = [[[0.4, 0.5, 0.3, 0.4], [0.7, 0.6, 0.2, 0.2]], [[0.5, 0.5, 0.9, 0.8]]]
LABELS = [[3, 1], [4]]


def tiny_config(**arguments: Any) -> Any:
    build = LazyConfig.load(str(MODELS / "sparse_detr.py"), "sparse_detr")
    return build(**{"backbone": L(PatchBackbone)(widths=[8, 12, 16]), **SIZES, **arguments})


def targets() -> list[Targets]:
    return targets_of(*BOXES, labels=LABELS)


def test_training() -> None:
    """128 tokens, of which the second image has 66: int(0.3 * 128) + 1 and int(0.3 * 66) + 1."""
    output, losses = run_training(with_noise(instantiate(tiny_config())), targets())
    assert output.selection is not None and output.proposal is not None
    assert output.selection.kept_tokens().tolist() == [[39, 20]] * 3
    assert output.decoder.boxes.shape == (2, 2, 12, 4)
    assert output.proposal.boxes.shape == (2, 128, 4) and not output.proposal.class_agnostic
    assert [prediction.boxes.shape for prediction in output.encoder_layers] == [(2, 39, 4)] * 2
    sets = ["", "_0", "_enc", "_enc_0", "_enc_1"]
    expected = {f"loss_{term}{s}" for term in ("class", "bbox", "giou") for s in sets}
    assert losses.keys() == expected | {"loss_token_selection"}


def test_the_map_holds_the_attention_of_all_queries_heads_and_layers() -> None:
    """Each of 12 queries spends 1 on each of 2 heads and 2 layers; some of it may fall outside."""
    output, _ = run_training(with_noise(instantiate(tiny_config())), targets())
    attention = output.decoder.token_attention
    assert attention is not None and attention.shape == (2, 128)
    spent = attention.sum(1)
    assert (spent <= 48 + 1e-3).all() and (spent > 24).all()


def test_evaluation_computes_nothing_for_the_losses() -> None:
    model = instantiate(tiny_config()).eval()
    output = model.detector(torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    assert output.decoder.token_attention is None and output.encoder_layers == []
    assert output.selection.kept_tokens().tolist() == [[39]] * 3


def test_every_parameter_gets_a_gradient() -> None:
    model = with_noise(instantiate(tiny_config()))
    _, losses = run_training(model, targets())
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_only_the_token_loss_teaches_the_score_head() -> None:
    """The choice of tokens has no gradient, and the decoder's map gives none to the decoder."""
    model = with_noise(instantiate(tiny_config()))
    _, losses = run_training(model, targets())
    losses.pop("loss_token_selection").backward(retain_graph=True)
    taught = {name for name, p in model.detector.named_parameters() if p.grad is not None}
    score_head = dict(
        model.detector.get_submodule("selection").named_parameters(prefix="selection")
    )
    assert score_head.keys() <= taught
    assert not any(name.startswith(("encoder.", "decoder.", "queries.")) for name in taught)
    model.zero_grad()
    total(losses).backward()
    assert all(parameter.grad is None for parameter in score_head.values())


def test_bfloat16_autocast() -> None:
    model = with_noise(instantiate(tiny_config()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, losses = run_training(model, targets())
    assert output.decoder.token_attention is not None
    assert output.decoder.token_attention.dtype is torch.float32
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


class OwnFeatures(nn.Module):
    """Scores a token by itself; the published head compares it with the mean of all tokens."""

    def forward(self, features: Tensor) -> Tensor:
        return features.sum(-1)


def small_image_of_a_batch(model: EfficientDETR) -> tuple[DetectorOutput, DetectorOutput]:
    """An image of 64 x 64 pixels alone, and the same as the second of a batch of 64 x 128."""
    images = torch.randn(2, 3, 64, 128)
    mask = padding_mask([(64, 128), (64, 64)], (64, 128))
    alone = model.detector(images[1:, :, :, :64], mask[1:, :, :64])
    return alone, model.detector(images.masked_fill(mask[:, None], 0), mask)


def test_a_padded_batch_detects_what_the_image_alone_does() -> None:
    """Given scores that do not depend on the batch; then the fillers of the batch change nothing.

    Group norm would see the padding, so the neck has none. Alone, the image has 64 + 16 + 4 + 1
    tokens and keeps int(25.5) + 1; the rows beyond are those of the larger image.
    """
    config = tiny_config(num_groups=None, num_queries=4)
    config.detector.selection.score_head = L(OwnFeatures)()
    model = with_noise(instantiate(config))
    with torch.no_grad():
        alone, batch = small_image_of_a_batch(model)
    assert batch.selection is not None and alone.selection is not None
    assert alone.selection.counts.tolist() == [26] and batch.selection.counts.tolist() == [52, 26]
    valid = ~batch.memory.padding_mask[1]
    close = torch.testing.assert_close
    close(batch.memory.features[1, valid], alone.memory.features[0], atol=1e-5, rtol=1e-5)
    close(batch.decoder.logits[:, 1], alone.decoder.logits[:, 0], atol=1e-4, rtol=1e-4)
    close(batch.decoder.boxes[:, 1], alone.decoder.boxes[:, 0], atol=1e-4, rtol=1e-4)
    for layer, expected in zip(batch.encoder_layers, alone.encoder_layers, strict=True):
        close(layer.boxes[1, :26], expected.boxes[0], atol=1e-4, rtol=1e-4)
        close(layer.logits[1, :26], expected.logits[0], atol=1e-4, rtol=1e-4)


def test_the_published_scores_depend_on_the_padding() -> None:
    """The mean in the score head counts padding in, and the published weights were trained so."""
    model = with_noise(instantiate(tiny_config(num_groups=None)))
    with torch.no_grad():
        alone, batch = small_image_of_a_batch(model)
    assert batch.selection is not None and alone.selection is not None
    scores = batch.selection.scores[1, ~batch.memory.padding_mask[1]]
    assert (scores != alone.selection.scores[0]).all()
    torch.testing.assert_close(scores, alone.selection.scores[0], atol=0.5, rtol=0)


def test_rows_go_on_from_layer_to_layer() -> None:
    """Fillers too, though they are never written to the memory: encoder heads learn from them.

    The second image keeps 20 of 39 rows, so that 19 of its rows are fillers.
    """
    model = with_noise(instantiate(tiny_config()))
    states: list[tuple[Tensor, Tensor]] = []
    for layer in model.detector.get_submodule("encoder.layers").children():
        layer.register_forward_hook(
            lambda _, args, output: states.append((args[0].features, output))
        )
    output, _ = run_training(model, targets())
    for (_, returned), (received, _) in zip(states, states[1:], strict=False):
        assert torch.equal(received, returned)
    assert output.selection is not None
    fillers = output.selection.indices[0][1, 20:]
    memory = output.memory.features[1, fillers]
    assert torch.equal(memory, states[0][0][1, 20:]), "as the neck gave them"


def test_without_the_efficient_options() -> None:
    """The authors' other variant: queries and proposals as in Deformable DETR, no encoder heads."""
    config = tiny_config()
    config.detector.encoder_heads = None
    config.detector.queries = L(BoxEmbeddedQueries)(
        num_queries=12, channels=16, score=L(FirstClassScore)()
    )
    model = with_noise(instantiate(config))
    output, losses = run_training(model, targets())
    assert output.proposal is not None and output.proposal.class_agnostic
    assert output.encoder_layers == [] and "loss_class_enc_0" not in losses
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_selection_for_another_number_of_layers_is_refused() -> None:
    config = tiny_config()
    config.detector.selection.num_layers = 2
    with pytest.raises(ConfigError, match="2 entries for 3 encoder.layers"):
        instantiate(config)


def test_encoder_heads_for_another_number_of_layers_are_refused() -> None:
    config = tiny_config()
    config.detector.encoder_heads.heads = config.detector.encoder_heads.heads[:1]
    with pytest.raises(ConfigError, match="encoder_heads has 1 heads for 3 encoder.layers: give 2"):
        instantiate(config)


def test_encoder_heads_without_a_selection_are_refused() -> None:
    config = tiny_config()
    config.detector.selection = None
    with pytest.raises(ConfigError, match="set detector.selection or remove encoder_heads"):
        instantiate(config)


def test_attention_that_cannot_be_mapped_is_refused() -> None:
    config = tiny_config()
    config.detector.decoder.layers[1].cross_attention = L(DenseDecoderAttention)(
        channels=16, num_heads=2
    )
    with pytest.raises(ConfigError, match=r"decoder.layers.1 has DenseDecoderAttention"):
        instantiate(config)


def test_the_config_survives_being_saved(tmp_path: Any) -> None:
    LazyConfig.save(tiny_config(keep_ratio=0.1), str(tmp_path / "model.yaml"))
    loaded = LazyConfig.load(str(tmp_path / "model.yaml"))
    model = instantiate(loaded)
    assert model.detector.selection.keep_ratio == 0.1
    assert len(model.detector.encoder_heads.heads) == 2
