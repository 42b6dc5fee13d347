"""Table from torchvision's names inside a ResNet to those of Detectron2's ResNet."""

from __future__ import annotations

from efficient_detr.checkpoint.conversion import Drop, Rename, Row

_COUNTER = "counts batches of training, which frozen norms do not use"
_STAGES = (1, 2, 3, 4)


def torchvision_resnet() -> list[Row]:
    """A ResNet of any depth, with basic blocks or bottlenecks; names are relative to it.

    Weights say nothing of strides and dilation: the model has to have them where torchvision does,
    strides in the 3x3 convolutions of bottlenecks.
    """
    return [
        Drop("bn1.num_batches_tracked", _COUNTER),
        Rename("conv1.weight", "stem.conv1.weight"),
        Rename("bn1.*", "stem.conv1.norm.*"),
        *(row for stage in _STAGES for row in _stage(f"layer{stage}.", f"res{stage + 1}.")),
        Drop("fc.*", "the head of image classification"),
    ]


def _stage(theirs: str, ours: str) -> list[Row]:
    theirs, ours = f"{theirs}{{block}}.", f"{ours}{{block}}."
    return [
        Drop(f"{theirs}bn{{convolution}}.num_batches_tracked", _COUNTER),
        Drop(f"{theirs}downsample.1.num_batches_tracked", _COUNTER),
        Rename(f"{theirs}conv{{convolution}}.weight", f"{ours}conv{{convolution}}.weight"),
        Rename(f"{theirs}bn{{convolution}}.*", f"{ours}conv{{convolution}}.norm.*"),
        Rename(f"{theirs}downsample.0.weight", f"{ours}shortcut.weight"),
        Rename(f"{theirs}downsample.1.*", f"{ours}shortcut.norm.*"),
    ]
