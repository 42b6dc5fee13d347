"""Batched inputs -> losses or instances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from efficient_detr.errors import UserError
from efficient_detr.meta_arch import EfficientDETR
from efficient_detr.structures import DetectorOutput
from tests.tiny_models import image_input, tiny_model, total

FAMILIES = ["dino", "focus_detr"]

both = pytest.mark.parametrize("family", FAMILIES)


def training_batch() -> list[dict[str, Any]]:
    return [
        image_input(64, 96, [[10, 10, 60, 40], [50, 20, 90, 60]], [1, 4]),
        image_input(48, 64, [[0, 0, 64, 48]], [0]),
    ]


def recorded_arguments(model: EfficientDETR, inputs: list[dict[str, Any]]) -> tuple[Any, ...]:
    seen: list[tuple[Any, ...]] = []
    handle = model.detector.register_forward_pre_hook(lambda _module, args: seen.append(args))
    model(inputs)
    handle.remove()
    return seen[0]


def test_is_registered_as_a_meta_architecture() -> None:
    assert META_ARCH_REGISTRY.get("EfficientDETR") is EfficientDETR


@pytest.mark.parametrize("training", [True, False])
def test_padding_is_masked_in_training_and_in_inference(training: bool) -> None:
    model = tiny_model("dino").train(training)
    images, mask, *_ = recorded_arguments(model, training_batch())
    assert images.shape == (2, 3, 64, 96)
    expected = torch.zeros(2, 64, 96, dtype=torch.bool)
    expected[1, 48:] = True
    expected[1, :, 64:] = True
    assert torch.equal(mask, expected)
    assert images[1][:, expected[1]].eq(0).all(), "padding is zero after normalisation"


def test_pixels_are_normalised_by_channel() -> None:
    model = tiny_model("dino").eval()
    inputs = image_input(64, 96)
    inputs["image"] = torch.tensor([124.0, 116.0, 104.0])[:, None, None].expand(3, 64, 96)
    images, _ = recorded_arguments(model, [inputs])
    expected = [(124 - 123.675) / 58.395, (116 - 116.28) / 57.12, (104 - 103.53) / 57.375]
    assert images[0, :, 5, 5].tolist() == pytest.approx(expected, abs=1e-5)


def test_targets_are_normalised_to_their_own_image() -> None:
    model = tiny_model("dino")
    _, _, targets = recorded_arguments(model, training_batch())
    assert targets[0].image_size == (64, 96) and targets[1].image_size == (48, 64)
    # (10, 10, 60, 40) in 64 x 96: centre (35, 25), size (50, 30).
    expected = torch.tensor([35 / 96, 25 / 64, 50 / 96, 30 / 64])
    torch.testing.assert_close(targets[0].boxes[0], expected)
    assert targets[1].boxes.tolist() == [[0.5, 0.5, 1, 1]]
    assert targets[0].labels.tolist() == [1, 4]


def expected_losses(family: str) -> set[str]:
    suffixes = ("", "_0", "_enc", "_dn", "_dn_0")
    names = {f"loss_{term}{s}" for term in ("class", "bbox", "giou") for s in suffixes}
    return names | ({"loss_foreground"} if family == "focus_detr" else set())


@both
def test_training_returns_weighted_losses(family: str) -> None:
    losses = tiny_model(family)(training_batch())
    assert losses.keys() == expected_losses(family)
    for name, value in losses.items():
        assert value.shape == () and value.isfinite() and value > 0, name


@both
@pytest.mark.parametrize("boxes", [[[], []], [[], [[5, 5, 50, 40]]]])
def test_images_without_boxes(family: str, boxes: list[list[list[float]]]) -> None:
    """Same terms as ever, no NaN, and a gradient (perhaps zero) for every parameter."""
    model = tiny_model(family)
    losses = model([image_input(64, 96, boxes[0], []), image_input(48, 64, boxes[1])])
    assert losses.keys() == expected_losses(family)
    assert total(losses).isfinite()
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if not any(boxes):
        assert losses["loss_bbox"] == losses["loss_giou_dn"] == losses["loss_class_dn"] == 0
        assert losses["loss_class"] > 0


@pytest.mark.parametrize("num_classes", [1, 91])
@both
def test_number_of_classes(family: str, num_classes: int) -> None:
    model = tiny_model(family, num_classes=num_classes)
    assert model.num_classes == num_classes
    batch = [image_input(64, 96, [[10, 10, 60, 40], [0, 0, 90, 60]], [0, num_classes - 1])]
    total(model(batch)).backward()
    model.eval()
    instances = model(batch)[0]["instances"]
    assert instances.pred_classes.max() < num_classes
    # 12 queries, one class: 12 pairs for 20 detections; boxes that end up empty are dropped.
    assert len(instances) <= min(20, 12 * num_classes)


@pytest.mark.parametrize("label", [5, 80, -1])
def test_wrong_label_names_the_image(label: int) -> None:
    batch = [image_input(64, 96, [[10, 10, 60, 40], [0, 0, 5, 5]], [0, label])]
    with pytest.raises(UserError) as caught:
        tiny_model("dino")(batch)
    message = str(caught.value)
    assert message.startswith(f"image 64x96.jpg has class {label}, but the model has 5 classes")
    assert "set model.num_classes" in message
    assert "\n" not in message


def test_wrong_label_of_an_image_without_a_file_name() -> None:
    batch = [image_input(64, 96, [[10, 10, 60, 40]], [5])]
    del batch[0]["file_name"]
    with pytest.raises(UserError, match="image 7 has class 5"):
        tiny_model("dino")(batch)


@both
def test_detections(family: str) -> None:
    model = tiny_model(family).eval()
    for inputs, (result,) in ((i, model([i])) for i in training_batch()):
        instances = result["instances"]
        height, width = inputs["image"].shape[-2:]
        assert instances.image_size == (height, width)
        boxes = instances.pred_boxes.tensor
        assert len(instances) > 0
        assert (boxes >= 0).all()
        assert (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all(), "empty boxes are dropped"
        assert instances.scores.tolist() == sorted(instances.scores.tolist(), reverse=True)
        assert (instances.scores > 0).all() and (instances.scores < 1).all()
        assert instances.pred_classes.dtype is torch.int64
        assert not boxes.requires_grad or torch.is_grad_enabled()


@pytest.mark.parametrize(("height", "width"), [(480, 640), (32, 24), (64, 96)])
def test_boxes_are_scaled_to_the_wanted_size(height: int, width: int) -> None:
    """The same input, once in network pixels and once in those of the original image."""
    model = tiny_model("dino").eval()
    inputs = image_input(64, 96)
    (plain,) = model([inputs])
    (scaled,) = model([{**inputs, "height": height, "width": width}])
    assert scaled["instances"].image_size == (height, width)
    factor = torch.tensor([width / 96, height / 64]).repeat(2)
    torch.testing.assert_close(
        scaled["instances"].pred_boxes.tensor, plain["instances"].pred_boxes.tensor * factor
    )
    assert torch.equal(scaled["instances"].scores, plain["instances"].scores)


def test_a_detection_ends_where_its_box_is() -> None:
    """A stand-in detector predicts the left half of an image of 64 x 96, wanted at 128 x 48."""
    model = tiny_model("dino", num_detections=1).eval()
    output = model.detector(torch.zeros(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    boxes = torch.tensor([0.25, 0.5, 0.5, 1.0]).expand_as(output.decoder.boxes)
    decoder = type(output.decoder)(output.decoder.logits, boxes, boxes)
    model.detector.forward = lambda *_: DetectorOutput(decoder, [])  # type: ignore[method-assign]
    (result,) = model([{**image_input(64, 96), "height": 128, "width": 48}])
    assert result["instances"].pred_boxes.tensor.tolist() == [[0, 0, 24, 128]]


def test_detections_of_a_batch_come_in_order() -> None:
    model = tiny_model("dino").eval()
    batch = training_batch()
    results = model(batch)
    assert [r["instances"].image_size for r in results] == [(64, 96), (48, 64)]


def test_state_dict_holds_no_pixel_statistics() -> None:
    """They come from the config; and they follow the model to another device or dtype."""
    model = tiny_model("dino")
    assert not [name for name in model.state_dict() if "pixel" in name]
    assert {name for name, _ in model.named_buffers()} >= {"pixel_mean", "pixel_std"}
    assert model.to("meta").pixel_mean.device.type == "meta"
    assert model.device.type == "meta"


@both
def test_same_seed_same_losses(family: str) -> None:
    runs: list[dict[str, Tensor]] = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        model, batch = tiny_model(family), training_batch()
        torch.manual_seed(seed)
        runs.append(model(batch))
    assert {k: v.item() for k, v in runs[0].items()} == {k: v.item() for k, v in runs[1].items()}
    assert runs[0]["loss_bbox_dn"] != runs[2]["loss_bbox_dn"], "denoising draws from the seed"
    assert runs[0]["loss_bbox"] == runs[2]["loss_bbox"], "matching queries do not see the noise"


@both
def test_same_input_same_detections(family: str) -> None:
    model, batch = tiny_model(family).eval(), training_batch()
    first, second = model(batch), model(batch)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["instances"].scores, other["instances"].scores)
        ours, theirs = one["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor
        assert torch.equal(ours, theirs)


@both
def test_bfloat16_autocast(family: str) -> None:
    model, batch = tiny_model(family), training_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch)
    assert all(value.isfinite() for value in losses.values())
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        instances = model(batch)[0]["instances"]
    assert instances.pred_boxes.tensor.isfinite().all()


def test_inputs_are_left_alone() -> None:
    model, batch = tiny_model("focus_detr"), training_batch()
    images = [inputs["image"].clone() for inputs in batch]
    boxes = [inputs["instances"].gt_boxes.tensor.clone() for inputs in batch]
    model(batch)
    model.eval()(batch)
    for inputs, image, box in zip(batch, images, boxes, strict=True):
        assert torch.equal(inputs["image"], image)
        assert torch.equal(inputs["instances"].gt_boxes.tensor, box)
