"""Where the resolution of DAT changes: stems and the convolutions between stages."""

from __future__ import annotations

from torch import Tensor, nn

from efficient_detr.modeling.backbones.map_layers import MapConvolution


class NormalizedConvolution(nn.Module):
    """A convolution and a norm over the channels of each cell.

    Args:
        in_channels: channels of the input.
        channels: C of the output.
        kernel_size: in cells.
        stride: in cells.
        padding: zeros added at each side, in cells; 0 drops the cells that fill no stride.
        bias: whether the convolution adds one.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.convolution = MapConvolution(
            in_channels, channels, kernel_size, stride=stride, padding=padding, bias=bias
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, H, W, channels in) to (B, H', W', C).

        Raises:
            ValueError: if the map is smaller than the kernel.
        """
        height, width = features.shape[1:3]
        kernel, padding = self.convolution.kernel_size[0], int(self.convolution.padding[0])
        if min(height, width) + 2 * padding < kernel:
            raise ValueError(
                f"a map of {height}x{width} cells is too small for a {kernel}x{kernel} "
                "convolution: pad images for DAT to at least 32 pixels a side."
            )
        return self.norm(self.convolution(features))


class PatchStem(NormalizedConvolution):
    """Every 4x4 pixels become a token: the stem of DAT (arXiv 2201.00520).

    Args:
        channels: C of the output.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__(in_channels=3, channels=channels, kernel_size=4, stride=4)


class OverlappingPatchStem(NormalizedConvolution):
    """Patches of 7x7 pixels at a stride of 4; part of DAT's code, but of no released model.

    Args:
        channels: C of the output.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__(in_channels=3, channels=channels, kernel_size=7, stride=4, padding=3)


class ConvolutionalStem(nn.Module):
    """Two 3x3 convolutions of stride 2: the stem of DAT++ (arXiv 2309.01430).

    Args:
        channels: C of the output, even; half of it lies between the convolutions.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.first = NormalizedConvolution(
            in_channels=3, channels=channels // 2, kernel_size=3, stride=2, padding=1
        )
        self.activation = nn.GELU()
        self.second = NormalizedConvolution(
            in_channels=channels // 2, channels=channels, kernel_size=3, stride=2, padding=1
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map images (B, H, W, 3) to (B, ceil(H / 4), ceil(W / 4), C)."""
        return self.second(self.activation(self.first(features)))


class PatchMerging(NormalizedConvolution):
    """Halves the resolution by 2x2 patches and changes the width; an odd last row is dropped.

    Args:
        in_channels: channels of the stage before.
        channels: C of the next stage.
    """

    def __init__(self, *, in_channels: int, channels: int) -> None:
        super().__init__(
            in_channels=in_channels, channels=channels, kernel_size=2, stride=2, bias=False
        )


class ConvolutionalMerging(NormalizedConvolution):
    """Halves the resolution, rounded up, by a 3x3 convolution of stride 2 (DAT++).

    Args:
        in_channels: channels of the stage before.
        channels: C of the next stage.
    """

    def __init__(self, *, in_channels: int, channels: int) -> None:
        super().__init__(
            in_channels=in_channels,
            channels=channels,
            kernel_size=3,
            stride=2,
            padding=1,
            bias=False,
        )
