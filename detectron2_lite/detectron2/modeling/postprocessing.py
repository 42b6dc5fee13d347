"""From the resolution of the network's input to that of the original image."""

from __future__ import annotations

from detectron2.structures import Instances


def detector_postprocess(results: Instances, output_height: int, output_width: int) -> Instances:
    """Scale predicted boxes to another image size.

    Args:
        results: predictions with ``pred_boxes`` for an image of ``results.image_size``; the boxes
            are modified in place.
        output_height: height of the wanted image in pixels.
        output_width: its width.

    Returns:
        New Instances of that image size; boxes are clipped to it and empty ones left out.

    Raises:
        AssertionError: there are no ``pred_boxes``.
        NotImplementedError: there are masks or keypoints.
    """
    scale_x = output_width / results.image_size[1]
    scale_y = output_height / results.image_size[0]
    scaled = Instances((output_height, output_width), **results.get_fields())
    assert scaled.has("pred_boxes"), "the predictions have no pred_boxes"
    if scaled.has("pred_masks") or scaled.has("pred_keypoints"):
        raise NotImplementedError(
            "masks and keypoints are not in detectron2_lite; install the real Detectron2"
        )
    scaled.pred_boxes.scale(scale_x, scale_y)
    scaled.pred_boxes.clip(scaled.image_size)
    return scaled[scaled.pred_boxes.nonempty()]
