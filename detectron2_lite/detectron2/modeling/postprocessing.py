"""From the resolution of the network's input to that of the original image."""

from detectron2._absent import absence_message
from detectron2.structures import Instances


def detector_postprocess(
    results: Instances, output_height: int, output_width: int, mask_threshold: float = 0.5
) -> Instances:
    """Scale ``pred_boxes`` from ``results.image_size`` to another image size, in place.

    Returns new Instances of that image size with the boxes clipped to it and without empty ones.
    Masks and keypoints raise NotImplementedError.
    """
    scale_x = output_width / results.image_size[1]
    scale_y = output_height / results.image_size[0]
    scaled = Instances((output_height, output_width), **results.get_fields())
    assert scaled.has("pred_boxes"), "the predictions have no pred_boxes"
    if scaled.has("pred_masks") or scaled.has("pred_keypoints"):
        raise NotImplementedError(absence_message("postprocessing of masks and keypoints"))
    scaled.pred_boxes.scale(scale_x, scale_y)
    scaled.pred_boxes.clip(scaled.image_size)
    return scaled[scaled.pred_boxes.nonempty()]
