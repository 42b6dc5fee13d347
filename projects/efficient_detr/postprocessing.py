"""Predictions of the last decoder layer -> Detectron2 `Instances`."""

from __future__ import annotations

from typing import ClassVar

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from efficient_detr.boxes import cxcywh_to_xyxy
from efficient_detr.structures import SetPrediction, gather_tokens


class Postprocessor(nn.Module):
    """Interface: choose detections among the predictions."""

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose N detections an image.

        Args:
            logits: (B, Q, K) class logits.

        Returns:
            scores in (0, 1), query indices and classes, each (B, N).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define select")

    def forward(
        self, prediction: SetPrediction, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Pick detections.

        Args:
            prediction: logits (B, Q, K) and boxes (B, Q, 4) of a batch.
            image_sizes: (height, width) of the unpadded network inputs.

        Returns:
            For each image `pred_boxes` in pixels of that input, `scores` in (0, 1) and
            `pred_classes`.
        """
        scores, queries, classes = self.select(prediction.logits)
        boxes = gather_tokens(cxcywh_to_xyxy(prediction.boxes), queries)
        return [
            to_instances(boxes[image], scores[image], classes[image], size)
            for image, size in enumerate(image_sizes)
        ]


class SigmoidTopK(Postprocessor):
    """The best (query, class) pairs by sigmoid score; a query may appear with several classes.

    Args:
        num_detections: detections an image, or all pairs if there are fewer.
    """

    background_classes: ClassVar[int] = 0

    def __init__(self, *, num_detections: int = 300) -> None:
        super().__init__()
        self.num_detections = num_detections

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Postprocessor`; best first."""
        scores = logits.sigmoid().flatten(1)
        best = scores.topk(min(self.num_detections, scores.shape[1]), dim=1)
        num_classes = logits.shape[-1]
        return best.values, best.indices // num_classes, best.indices % num_classes


class SoftmaxBestClass(Postprocessor):
    """Every query with its most probable class; the last class stands for "no object" (DETR)."""

    background_classes: ClassVar[int] = 1

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Postprocessor`; in the order of the queries."""
        scores, classes = logits.softmax(-1)[..., :-1].max(-1)
        queries = torch.arange(logits.shape[1], device=logits.device)
        return scores, queries.expand_as(classes), classes


def to_instances(
    boxes: Tensor, scores: Tensor, classes: Tensor, image_size: tuple[int, int]
) -> Instances:
    """Detectron2 instances of one image from normalised boxes (N, 4) as (x0, y0, x1, y1)."""
    height, width = image_size
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(boxes * boxes.new_tensor([width, height, width, height]))
    instances.scores = scores
    instances.pred_classes = classes
    return instances
