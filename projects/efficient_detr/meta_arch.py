"""The one Detectron2 meta-architecture: batched inputs -> detector -> losses or instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import META_ARCH_REGISTRY, detector_postprocess
from detectron2.structures import ImageList
from torch import Tensor, nn

from efficient_detr.boxes import xyxy_to_cxcywh
from efficient_detr.errors import UserError
from efficient_detr.model_compatibility import check_model
from efficient_detr.modeling.detector import Detector
from efficient_detr.postprocessing import Postprocessor
from efficient_detr.structures import DetectorOutput, Targets


@META_ARCH_REGISTRY.register()
class EfficientDETR(nn.Module):
    """A detection transformer for Detectron2.

    Args:
        detector: the shared detector.
        losses: loss objects, called with the detector's output and the targets in training.
        postprocessor: predictions -> instances.
        num_classes: K; labels are in [0, K).
        pixel_mean: mean of each channel, in the units of the input image (0 to 255).
        pixel_std: standard deviation of each channel.
        input_format: channel order of the input images, "RGB" or "BGR".

    Raises:
        ConfigError: if losses, postprocessor and detector do not fit together; it names both parts.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        detector: Detector,
        losses: Sequence[nn.Module],
        postprocessor: Postprocessor,
        num_classes: int,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        input_format: str = "RGB",
    ) -> None:
        super().__init__()
        self.detector = detector
        self.losses = nn.ModuleList(losses)
        self.postprocessor = postprocessor
        self.num_classes = num_classes
        self.input_format = input_format
        mean, std = torch.tensor(pixel_mean), torch.tensor(pixel_std)
        self.register_buffer("pixel_mean", mean[:, None, None], persistent=False)
        self.register_buffer("pixel_std", std[:, None, None], persistent=False)
        check_model(self)

    @property
    def device(self) -> torch.device:
        """Where the model, and so its computation, lives."""
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Train or detect.

        Args:
            batched_inputs: for each image a dict as of Detectron2's `DatasetMapper`: "image" (3, H,
                W) in 0 to 255; in training "instances" with `gt_boxes` and `gt_classes`; at test
                time optionally "height" and "width" of the wanted output.

        Returns:
            In training the weighted losses by name, to be added up; else for each image
            `{"instances": Instances}` with `pred_boxes` in pixels, `scores` and `pred_classes`.

        Raises:
            UserError: if a label is not in [0, K); it names the image.
        """
        images = self.preprocess(batched_inputs)
        padding_mask = padding_mask_of(images)
        if not self.training:
            output = self.detector(images.tensor, padding_mask)
            sizes = [(size[0], size[1]) for size in images.image_sizes]
            return self.rescale(self.postprocessor(output.prediction, sizes), batched_inputs)
        targets = self.targets(batched_inputs)
        output = self.detector(images.tensor, padding_mask, targets)
        return self.compute_losses(output, targets)

    def compute_losses(self, output: DetectorOutput, targets: list[Targets]) -> dict[str, Tensor]:
        """The weighted terms of all losses by name."""
        terms: dict[str, Tensor] = {}
        for loss in self.losses:
            terms |= loss(output, targets)
        return terms

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise the images and pad them at the right and bottom to a common size."""
        images = [
            (x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        backbone = self.detector.backbone
        return ImageList.from_tensors(images, getattr(backbone, "size_divisibility", 0))

    def targets(self, batched_inputs: list[dict[str, Any]]) -> list[Targets]:
        """Ground truth of a batch as the detector wants it."""
        targets = []
        for inputs in batched_inputs:
            instances = inputs["instances"]
            height, width = instances.image_size
            _check_labels(instances.gt_classes, self.num_classes, inputs)
            scale = instances.gt_boxes.tensor.new_tensor([width, height, width, height])
            boxes = xyxy_to_cxcywh(instances.gt_boxes.tensor / scale)
            targets.append(
                Targets(
                    labels=instances.gt_classes.to(self.device),
                    boxes=boxes.to(self.device),
                    image_size=(height, width),
                )
            )
        return targets

    def rescale(
        self, results: list[Any], batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Scale detections from network input pixels to "height" and "width" of the inputs.

        Boxes are clipped to the output; detections that are empty there are dropped.
        """
        outputs = []
        for instances, inputs in zip(results, batched_inputs, strict=True):
            height = inputs.get("height", instances.image_size[0])
            width = inputs.get("width", instances.image_size[1])
            outputs.append({"instances": detector_postprocess(instances, height, width)})
        return outputs


def padding_mask_of(images: ImageList) -> Tensor:
    """(B, H, W) bool mask of a padded batch, True on padding."""
    height, width = images.tensor.shape[-2:]
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=images.tensor.device)
    for image_mask, size in zip(mask, images.image_sizes, strict=True):
        image_mask[: size[0], : size[1]] = False
    return mask


def _check_labels(labels: Tensor, num_classes: int, inputs: dict[str, Any]) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"image {inputs.get('file_name', inputs.get('image_id', '?'))} has class "
            f"{int(wrong[0])}, but the model has {num_classes} classes (0 to "
            f"{num_classes - 1}): set model.num_classes to the number of classes of the dataset"
        )
