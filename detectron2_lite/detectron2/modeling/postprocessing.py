"""From the resolution of the network's input to that of the original image."""

from detectron2.structures import Instances


def detector_postprocess(results: Instances, output_height: int, output_width: int) -> Instances:
    """New Instances with ``pred_boxes`` scaled to another image, clipped, and without empty ones.

    The boxes of ``results`` are scaled in place.
    """
    height, width = results.image_size
    scaled = Instances((output_height, output_width), **results.get_fields())
    scaled.pred_boxes.scale(output_width / width, output_height / height)
    scaled.pred_boxes.clip(scaled.image_size)
    return scaled[scaled.pred_boxes.nonempty()]
