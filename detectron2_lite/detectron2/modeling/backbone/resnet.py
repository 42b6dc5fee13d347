"""ResNet (arXiv:1512.03385)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import fvcore.nn.weight_init as weight_init
from detectron2.layers import CNNBlockBase, Conv2d, Norm, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone

# Depth: number of blocks in each stage (table 1 of the paper).
_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def _conv(inputs: int, outputs: int, kernel_size: int, norm: Norm, **kwargs: Any) -> Conv2d:
    norm_layer = get_norm(norm, outputs)
    return Conv2d(inputs, outputs, kernel_size, bias=False, norm=norm_layer, **kwargs)


class _ResidualBlock(CNNBlockBase):
    """``relu(branch(x) + shortcut(x))``; the shortcut is a projection where channels change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut: Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, norm, stride=stride)

    def _initialize(self, *branch: Conv2d) -> None:
        """Draw He-normal weights, those of the shortcut last, in the real one's order."""
        for conv in (*branch, self.shortcut):
            if conv is not None:
                weight_init.c2_msra_fill(conv)

    def _join(self, branch: Tensor, x: Tensor) -> Tensor:
        branch += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(branch)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions, the first with the stride: the block of ResNet-18 and 34."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: Norm = "BN"
    ) -> None:
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride, padding=1)
        self.conv2 = _conv(out_channels, out_channels, 3, norm, padding=1)
        self._initialize(self.conv1, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        return self._join(self.conv2(F.relu_(self.conv1(x))), x)


class BottleneckBlock(_ResidualBlock):
    """Convolutions 1x1, 3x3, 1x1 around a narrow middle: the block of ResNet-50 and deeper.

    ``stride_in_1x1`` puts the stride in the first convolution (the models of the paper's authors)
    rather than in the 3x3 one (torchvision's).
    """

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
        super().__init__(in_channels, out_channels, stride, norm)
        first, middle = (stride, 1) if stride_in_1x1 else (1, stride)
        width = bottleneck_channels
        spread = {"padding": dilation, "dilation": dilation, "groups": num_groups}
        self.conv1 = _conv(in_channels, width, 1, norm, stride=first)
        self.conv2 = _conv(width, width, 3, norm, stride=middle, **spread)
        self.conv3 = _conv(width, out_channels, 1, norm)
        self._initialize(self.conv1, self.conv2, self.conv3)

    def forward(self, x: Tensor) -> Tensor:
        return self._join(self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x))))), x)


class BasicStem(CNNBlockBase):
    """7x7 convolution and max pooling, together of stride 4."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: Norm = "BN") -> None:
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2, padding=3)
        weight_init.c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class ResNet(Backbone):
    """A stem and stages ``res2``, ``res3``, ... of residual blocks, up to the last wanted one.

    ``out_features`` names what is returned, of ``stem``, ``res2`` ..., by default the last.
    ``freeze_at`` >= 1 freezes the stem, and above that the stages up to ``res{freeze_at}``.
    """

    def __init__(
        self,
        stem: CNNBlockBase,
        stages: Sequence[Sequence[CNNBlockBase]],
        *,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        self.stem = stem
        self._out_feature_strides = {"stem": stem.stride}
        self._out_feature_channels = {"stem": stem.out_channels}
        names = [f"res{number}" for number in range(2, 2 + len(stages))]
        self._out_features = names[-1:] if out_features is None else list(out_features)
        unknown = set(self._out_features) - {"stem", *names}
        assert not unknown, f"out_features {sorted(unknown)} are none of {['stem', *names]}"
        while names and names[-1] not in self._out_features:
            names.pop()
        self.stage_names = tuple(names)
        stride = stem.stride
        for name, blocks in zip(names, stages, strict=False):
            self.add_module(name, nn.Sequential(*blocks))
            stride *= prod(block.stride for block in blocks)
            self._out_feature_strides[name] = stride
            self._out_feature_channels[name] = blocks[-1].out_channels
        self.freeze(freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        features = {"stem": x}
        for name in self.stage_names:
            x = features[name] = getattr(self, name)(x)
        return {name: value for name, value in features.items() if name in self._out_features}

    def freeze(self, freeze_at: int = 0) -> ResNet:
        for name in ("stem", *self.stage_names)[:freeze_at]:
            blocks = [self.stem] if name == "stem" else getattr(self, name)
            for block in blocks:
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
        """One stage; an argument such as ``stride_per_block`` has one value for each block."""
        suffix = "_per_block"
        listed = {k.removesuffix(suffix): v for k, v in kwargs.items() if k.endswith(suffix)}
        shared = {name: v for name, v in kwargs.items() if not name.endswith(suffix)}
        for name, values in listed.items():
            assert len(values) == num_blocks, f"{name}{suffix} needs {num_blocks} values"
        blocks = []
        for index in range(num_blocks):
            own = {name: values[index] for name, values in listed.items()}
            inputs = in_channels if index == 0 else out_channels
            own.update(in_channels=inputs, out_channels=out_channels)
            blocks.append(block_class(**shared, **own))
        return blocks

    @staticmethod
    def make_default_stages(depth: int, **kwargs: Any) -> list[list[CNNBlockBase]]:
        """The four stages of ResNet-18, 34, 50, 101 or 152 of the paper's table 1."""
        bottleneck = depth >= 50
        block_class = BottleneckBlock if bottleneck else BasicBlock
        stages: list[list[CNNBlockBase]] = []
        inputs = 64
        for index, count in enumerate(_BLOCKS[depth]):
            width = 64 * 2**index
            if bottleneck:
                kwargs["bottleneck_channels"] = width
            outputs = width * 4 if bottleneck else width
            kwargs["stride_per_block"] = [1 if index == 0 else 2] + [1] * (count - 1)
            widths = {"in_channels": inputs, "out_channels": outputs}
            stages.append(ResNet.make_stage(block_class, count, **widths, **kwargs))
            inputs = outputs
        return stages


ResNetBlockBase = CNNBlockBase  # older names
make_stage = ResNet.make_stage
