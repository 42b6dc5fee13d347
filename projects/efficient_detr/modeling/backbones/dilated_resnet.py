"""Detectron2's ResNet with a dilated last stage, the "DC5" of DETR."""

from __future__ import annotations

from typing import Any

from detectron2.layers import CNNBlockBase
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

from efficient_detr.errors import ConfigError

_INPUTS, _WIDTH, _OUTPUTS = 1024, 512, 2048
"""Channels of res5 in ResNet-50 and deeper: of its input, inside its blocks, of its output."""


def dilated_resnet_stages(*, depth: int = 50, **block_arguments: Any) -> list[list[CNNBlockBase]]:
    """The stages of `ResNet.make_default_stages`, with res5 at the resolution of res4.

    The stride of res5 is given up, and its 3x3 convolutions look two cells far instead, which keeps
    their field of view (DETR, section 4). The first block has dilation 1: before the stride was
    taken away, its convolution saw neighbours of the finer map, as the published weights expect.

    Args:
        depth: 50, 101 or 152; shallower ResNets have no bottleneck to dilate.
        block_arguments: arguments of every block, such as `norm` and `stride_in_1x1`.

    Returns:
        The blocks of res2, res3, res4 and res5.

    Raises:
        ConfigError: if `depth` is less than 50.
    """
    if depth < 50:
        raise ConfigError(
            f"backbone.stages.depth={depth} cannot be dilated: use 50, 101 or 152, or "
            "ResNet.make_default_stages"
        )
    stages: list[list[CNNBlockBase]] = ResNet.make_default_stages(depth=depth, **block_arguments)
    num_blocks = len(stages[-1])
    stages[-1] = ResNet.make_stage(
        block_class=BottleneckBlock,
        num_blocks=num_blocks,
        in_channels=_INPUTS,
        out_channels=_OUTPUTS,
        bottleneck_channels=_WIDTH,
        dilation_per_block=[1] + [2] * (num_blocks - 1),
        **block_arguments,
    )
    return stages
