"""Predictions of the last decoder layer -> Detectron2 `Instances`."""

from __future__ import annotations

from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from efficient_detr.boxes import cxcywh_to_xyxy
from efficient_detr.structures import SetPrediction, gather_tokens


class SigmoidTopK(nn.Module):
    """The best (query, class) pairs by sigmoid score; a query may appear with several classes.

    Args:
        num_detections: detections an image, or all pairs if there are fewer.
    """

    def __init__(self, *, num_detections: int = 300) -> None:
        super().__init__()
        self.num_detections = num_detections

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The best scores (B, N) of logits (B, Q, K) and their indices query * K + class."""
        scores = logits.sigmoid().flatten(1)
        best = scores.topk(min(self.num_detections, scores.shape[1]), dim=1)
        return best.values, best.indices

    def forward(
        self, prediction: SetPrediction, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Pick detections.

        Args:
            prediction: logits (B, Q, K) and boxes (B, Q, 4) of a batch.
            image_sizes: (height, width) of the unpadded network inputs.

        Returns:
            For each image `pred_boxes` in pixels of that input, `scores` in (0, 1), best first, and
            `pred_classes`.
        """
        scores, indices = self.select(prediction.logits)
        num_classes = prediction.logits.shape[-1]
        boxes = gather_tokens(cxcywh_to_xyxy(prediction.boxes), indices // num_classes)
        classes = indices % num_classes
        return [
            to_instances(boxes[image], scores[image], classes[image], size)
            for image, size in enumerate(image_sizes)
        ]


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
