"""ResNet ("Deep Residual Learning for Image Recognition", arXiv:1512.03385)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.layers import CNNBlockBase, Conv2d, get_norm

from .backbone import Backbone

Norm = str | Callable[[int], nn.Module] | None
ResNetBlockBase = CNNBlockBase

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def _conv(in_channels: int, out_channels: int, norm: Norm, **kwargs: Any) -> Conv2d:
    return Conv2d(in_channels, out_channels, bias=False, norm=get_norm(norm, out_channels), **kwargs)


class _ResidualBlock(CNNBlockBase):
    """``relu(branch(x) + shortcut(x))``; the shortcut is a projection where channels change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut: Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, norm, kernel_size=1, stride=stride)

    def _initialize(self, *branch: Conv2d) -> None:
        """Draw He-normal weights, those of the shortcut last."""
        for conv in (*branch, self.shortcut):
            if conv is not None:
                weight_init.c2_msra_fill(conv)

    def _join(self, branch: Tensor, x: Tensor) -> Tensor:
        branch += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(branch)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions: the block of ResNet-18 and 34."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: Norm = "BN"
    ) -> None:
        """The stride sits in the first convolution; ``norm``: see ``layers.get_norm``."""
        super().__init__(in_channels, out_channels, stride, norm)
        kernel: dict[str, Any] = {"kernel_size": 3, "padding": 1}
        self.conv1 = _conv(in_channels, out_channels, norm, stride=stride, **kernel)
        self.conv2 = _conv(out_channels, out_channels, norm, **kernel)
        self._initialize(self.conv1, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        return self._join(self.conv2(F.relu_(self.conv1(x))), x)


class BottleneckBlock(_ResidualBlock):
    """Convolutions 1x1, 3x3, 1x1 around a narrow middle: the block of ResNet-50 and deeper."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: Norm = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ) -> None:
        """Build the block.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            bottleneck_channels: channels in the middle.
            stride: of the block.
            num_groups: groups of the 3x3 convolution.
            norm: see ``layers.get_norm``.
            stride_in_1x1: stride in the first 1x1 convolution (the paper's models) rather than
                in the 3x3 one (torchvision's).
            dilation: of the 3x3 convolution.
        """
        super().__init__(in_channels, out_channels, stride, norm)
        first, middle = (stride, 1) if stride_in_1x1 else (1, stride)
        width = bottleneck_channels
        self.conv1 = _conv(in_channels, width, norm, kernel_size=1, stride=first)
        self.conv2 = _conv(
            width,
            width,
            norm,
            kernel_size=3,
            stride=middle,
            padding=dilation,
            groups=num_groups,
            dilation=dilation,
        )
        self.conv3 = _conv(width, out_channels, norm, kernel_size=1)
        self._initialize(self.conv1, self.conv2, self.conv3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        branch = F.relu_(self.conv2(F.relu_(self.conv1(x))))
        return self._join(self.conv3(branch), x)


class BasicStem(CNNBlockBase):
    """7x7 convolution and max pooling, together of stride 4."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: Norm = "BN") -> None:
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _conv(in_channels, out_channels, norm, kernel_size=7, stride=2, padding=3)
        weight_init.c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C_in, H, W) to (B, C_out, H / 4, W / 4)."""
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class ResNet(Backbone):
    """A stem and stages ``res2``, ``res3``, ... of residual blocks."""

    def __init__(
        self,
        stem: CNNBlockBase,
        stages: Sequence[Sequence[CNNBlockBase]],
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ) -> None:
        """Build the network.

        Args:
            stem: the first block.
            stages: blocks of each stage, see :meth:`make_default_stages`.
            num_classes: adds average pooling and a classifier ``linear``, where given.
            out_features: names to return, of ``stem``, ``res2`` ... ``linear``; default the last.
                Stages above the last named one are dropped.
            freeze_at: see :meth:`freeze`.
        """
        super().__init__()
        self.stem = stem
        self.num_classes = num_classes
        self._out_feature_strides = {"stem": stem.stride}
        self._out_feature_channels = {"stem": stem.out_channels}
        self.stages: list[nn.Sequential] = []
        if out_features is not None:
            names = [f"res{number}" for number in range(2, 6)]
            stages = stages[: max(names.index(f) + 1 if f in names else 0 for f in out_features)]
        name, stride, channels = "stem", stem.stride, stem.out_channels
        for number, blocks in enumerate(stages, start=2):
            name = f"res{number}"
            assert len(blocks) > 0, f"stage {name} has no blocks"
            assert all(isinstance(block, CNNBlockBase) for block in blocks), name
            self.stages.append(nn.Sequential(*blocks))
            self.add_module(name, self.stages[-1])
            stride *= prod(block.stride for block in blocks)
            channels = blocks[-1].out_channels
            self._out_feature_strides[name] = stride
            self._out_feature_channels[name] = channels
        self.stage_names = tuple(f"res{number}" for number in range(2, 2 + len(self.stages)))
        if num_classes is not None:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.linear = nn.Linear(channels, num_classes)
            nn.init.normal_(self.linear.weight, std=0.01)
            name = "linear"
        self._out_features = [name] if out_features is None else list(out_features)
        available = [child for child, _ in self.named_children()]
        assert self._out_features, "out_features is empty"
        for feature in self._out_features:
            assert feature in available, f"out_features '{feature}' is none of {available}"
        self.freeze(freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) to the wanted features by name."""
        assert x.dim() == 4, f"ResNet reads (B, C, H, W), got {tuple(x.shape)}"
        features = {"stem": self.stem(x)}
        x = features["stem"]
        for name, stage in zip(self.stage_names, self.stages):
            x = features[name] = stage(x)
        if self.num_classes is not None:
            features["linear"] = self.linear(torch.flatten(self.avgpool(x), 1))
        return {name: value for name, value in features.items() if name in self._out_features}

    def freeze(self, freeze_at: int = 0) -> ResNet:
        """Freeze the stem (``freeze_at`` >= 1) and the stages up to ``res{freeze_at}``."""
        if freeze_at >= 1:
            self.stem.freeze()
        for stage in self.stages[: max(freeze_at - 1, 0)]:
            for block in stage:
                block.freeze()
        return self

    @staticmethod
    def make_stage(
        block_class: type[CNNBlockBase],
        num_blocks: int,
        *,
        in_channels: int,
        out_channels: int,
        **kwargs: Any,
    ) -> list[CNNBlockBase]:
        """Blocks of one stage; only the first changes the number of channels.

        Args:
            block_class: the class of the blocks.
            num_blocks: how many.
            in_channels: of the stage.
            out_channels: of the stage.
            kwargs: arguments of every block. A name that ends in ``_per_block`` holds a list with
                one value for each block, e.g. ``stride_per_block=[2, 1, 1]``.
        """
        blocks = []
        suffix = "_per_block"
        listed = {name.removesuffix(suffix): v for name, v in kwargs.items() if suffix in name}
        shared = {name: value for name, value in kwargs.items() if suffix not in name}
        for name, values in listed.items():
            assert len(values) == num_blocks, f"{name}{suffix} needs {num_blocks} values"
            assert name not in shared, f"both {name} and {name}{suffix} are given"
        for index in range(num_blocks):
            own = {name: values[index] for name, values in listed.items()}
            blocks.append(
                block_class(in_channels=in_channels, out_channels=out_channels, **shared, **own)
            )
            in_channels = out_channels
        return blocks

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs: Any
    ) -> list[list[CNNBlockBase]]:
        """The four stages of ResNet-18, 34, 50, 101 or 152 of the paper (table 1).

        Args:
            depth: one of these numbers.
            block_class: default :class:`BasicBlock` below 50, :class:`BottleneckBlock` otherwise.
            kwargs: further arguments of :meth:`make_stage`.
        """
        counts = _BLOCKS_PER_STAGE[depth]
        bottleneck = depth >= 50
        block_class = block_class or (BottleneckBlock if bottleneck else BasicBlock)
        outputs = [64 * 2**stage * (4 if bottleneck else 1) for stage in range(4)]
        stages = []
        for count, stride, inputs, channels in zip(counts, (1, 2, 2, 2), [64, *outputs], outputs):
            if bottleneck:
                kwargs["bottleneck_channels"] = channels // 4
            stages.append(
                ResNet.make_stage(
                    block_class,
                    count,
                    stride_per_block=[stride] + [1] * (count - 1),
                    in_channels=inputs,
                    out_channels=channels,
                    **kwargs,
                )
            )
        return stages


def make_stage(*args: Any, **kwargs: Any) -> list[CNNBlockBase]:
    """:meth:`ResNet.make_stage` under its older name."""
    return ResNet.make_stage(*args, **kwargs)
