"""ACT and its distillation on a tiny DETR."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.modeling.attention.clustered import (
    ClusteredEncoderAttention,
    clustered_attentions,
    exact_attention,
)
from efficient_detr.modeling.attention.dense import DenseEncoderAttention
from efficient_detr.modeling.attention.token_clustering import TokenClustering
from efficient_detr.modeling.detector import Detector
from efficient_detr.modeling.distillation import DistillationDetector
from tests import tiny_models
from tests.tiny_models import (
    MODELS,
    PatchBackbone,
    image_input,
    padding_mask,
    targets_of,
    total,
    with_noise,
)

BOXES = [[[0.4, 0.5, 0.3, 0.4], [0.7, 0.6, 0.2, 0.2]], [[0.5, 0.5, 0.9, 0.8]]]
SIZES = [(128, 192), (96, 128)]


def tiny_config(name: str, **arguments: Any) -> Any:
    """ "act_detr" or "detr" with 24 x 16 tokens."""
    if name == "act_detr":
        arguments = {
            "rounds": 4,
            "width": 2.0,
            "min_tokens": 0,
            "max_cluster_ratio": 1.0,
        } | arguments
    return LazyConfig.load(str(MODELS / f"{name}.py"), name)(
        backbone=L(PatchBackbone)(widths=[8, 12, 16]),
        in_features=["res3"],
        in_channels=[8],
        num_classes=5,
        channels=16,
        num_heads=2,
        hidden_channels=24,
        encoder_layers=2,
        decoder_layers=2,
        num_queries=6,
        **{"dropout": 0.0, **arguments},
    )


def distilled(config: Any) -> Any:
    return LazyConfig.load(str(MODELS / "act_detr.py"), "distilled")(config)


def tiny_model(config: Any) -> EfficientDETR:
    """A model in training mode, with weights off their start values."""
    model: EfficientDETR = with_noise(instantiate(config), 0.2)
    return model


def batch() -> tuple[Tensor, Tensor]:
    mask = padding_mask(SIZES, (128, 192))
    return torch.randn(2, 3, 128, 192).masked_fill(mask[:, None], 0), mask


def same(first: Any, second: Any) -> bool:
    return torch.equal(first.boxes, second.boxes) and torch.equal(first.logits, second.logits)


def test_teacher_and_student_share_weights() -> None:
    model = tiny_model(distilled(tiny_config("act_detr"))).eval()
    images, mask = batch()
    output = model.detector(images, mask, targets_of(*BOXES))
    clustered = model.detector(images, mask)
    assert clustered.student is None
    assert output.student is not None and same(output.student, clustered.decoder)
    with exact_attention(model):
        assert same(output.decoder, model.detector(images, mask).decoder)
    assert not same(output.student, output.decoder)
    dense = instantiate(tiny_config("detr"))
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        output.decoder.boxes, dense.eval().detector(images, mask).decoder.boxes
    )


def test_the_backbone_runs_once() -> None:
    model = tiny_model(distilled(tiny_config("act_detr")))
    calls: list[int] = []
    model.detector.backbone.register_forward_hook(lambda *args: calls.append(1))
    model.detector(*batch(), targets_of(*BOXES))
    assert len(calls) == 1


def test_losses_and_gradients() -> None:
    """Those of the teacher's set loss, and of the student's boxes, together."""
    model = tiny_model(distilled(tiny_config("act_detr")))
    images, mask = batch()
    targets = targets_of(*BOXES)
    losses = model.compute_losses(model.detector(images, mask, targets), targets)
    assert losses["loss_box_distillation"] > 0
    assert {"loss_class", "loss_bbox", "loss_giou", "loss_bbox_0"} <= losses.keys()
    total(losses).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    # The same by hand, each pass on its own.
    with exact_attention(model):
        teacher = Detector.forward(model.detector, images, mask)
    student = Detector.forward(model.detector, images, mask)
    difference = student.prediction.boxes - teacher.prediction.boxes.detach()
    (total(model.losses[0](teacher, targets)) + difference.square().mean()).backward()
    assert {name.split(".")[1] for name in gradients} == {
        *("backbone", "neck", "encoder", "queries", "decoder")
    }
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])
        else:  # The later stages of the backbone.
            assert parameter.grad is None


def test_a_training_step_and_inference() -> None:
    model = tiny_model(distilled(tiny_config("act_detr", dropout=0.1, redraw=True)))
    inputs = [
        image_input(128, 192, [[10, 20, 60, 90]], [1]),
        image_input(96, 128, [[5, 5, 40, 50]], [2]),
    ]
    losses = model(inputs)
    assert all(loss.isfinite() for loss in losses.values())
    assert not any(part.exact for part in clustered_attentions(model))
    model.eval()
    with torch.no_grad():
        first, second = model(inputs), model(inputs)
    assert first[0]["instances"].scores.equal(second[0]["instances"].scores)  # no redraw


def test_weights_of_dense_detr_fit() -> None:
    dense, clustered = instantiate(tiny_config("detr")), instantiate(tiny_config("act_detr"))
    clustered.load_state_dict(dense.state_dict(), strict=True)
    taught = instantiate(distilled(tiny_config("act_detr")))
    taught.load_state_dict(dense.state_dict(), strict=True)


def test_layers_hash_differently() -> None:
    model = instantiate(tiny_config("act_detr", key_rounds=3))
    first, second = clustered_attentions(model.detector.encoder)
    drawn = [
        part.directions[:, :3]
        for attention in (first, second)
        for part in (attention.query_clustering, attention.key_clustering)
    ]
    assert len({float(directions[0, 0]) for directions in drawn}) == 4


@pytest.mark.parametrize("family", ["detr", "act_detr"])
def test_padded_batch_equals_the_images_alone(family: str) -> None:
    model = tiny_model(tiny_config(family)).eval()
    images, mask = batch()
    together = model.detector(images, mask).decoder
    height, width = SIZES[1]
    alone = model.detector(images[1:, :, :height, :width], mask[1:, :height, :width]).decoder
    torch.testing.assert_close(together.boxes[:, 1:], alone.boxes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.logits[:, 1:], alone.logits, atol=1e-4, rtol=1e-4)


def test_nothing_to_teach() -> None:
    config = distilled(tiny_config("act_detr"))
    for layer in config.detector.encoder.layers:
        layer.attention = L(DenseEncoderAttention)(channels=16, num_heads=2)
    with pytest.raises(ConfigError, match=r"DistillationDetector.*TransformerEncoder"):
        instantiate(config)


def test_selected_queries_do_not_correspond() -> None:
    config = tiny_models.tiny_config("dino")
    config.detector._target_ = DistillationDetector
    for layer in config.detector.encoder.layers:
        layer.attention = L(ClusteredEncoderAttention)(
            channels=16, num_heads=2, query_clustering=L(TokenClustering)(head_channels=8)
        )
    with pytest.raises(ConfigError, match=r"LearnedContentQueries.*use learned queries"):
        instantiate(config)


# The configs -------------------------------------------------------------------------------------


def full_model(name: str) -> EfficientDETR:
    return instantiate(LazyConfig.load(str(MODELS.parents[1] / f"{name}.py")).model)


def test_checkpoints_of_detr_fit_the_configs() -> None:
    """Names and shapes are equal, whether the last stage is dilated or not."""
    shapes = {
        name: {key: value.shape for key, value in full_model(name).state_dict().items()}
        for name in ("detr", "detr_dc5", "act_detr", "act_detr_mtkd")
    }
    assert shapes["act_detr"] == shapes["detr_dc5"] == shapes["detr"]
    assert shapes["act_detr_mtkd"] == shapes["act_detr"]


def test_fine_tuning_is_gentler_than_training() -> None:
    clustered = LazyConfig.load(str(MODELS.parents[1] / "act_detr.py"))
    taught = LazyConfig.load(str(MODELS.parents[1] / "act_detr_mtkd.py"))
    assert taught.optimizer.lr < clustered.optimizer.lr
    assert taught.train.max_iter == taught.lr_multiplier.milestones[-1] < clustered.train.max_iter
    assert len(taught.model.losses) == len(clustered.model.losses) + 1
