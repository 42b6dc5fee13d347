"""Channel mapper: backbone maps of different widths -> maps of one width, plus coarser ones.

Deformable DETR, section 4.2 and appendix A.2: 1x1 convolutions on the backbone's maps; every extra
level is a stride-2 3x3 convolution, the first on the last backbone map, the next on the level
before. DETR's input projection is the case of one level without a norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.layers import Conv2d
from torch import Tensor, nn

from efficient_detr.errors import ConfigError


class ChannelMapper(nn.Module):
    """Map backbone features to `num_levels` maps of C channels, as a rule with a group norm each.

    Args:
        in_features: names of the backbone maps, finest first.
        in_channels: their channels.
        channels: C of the output.
        num_levels: number of output maps, at least one for each input; the rest are extra levels.
        num_groups: groups of the group norm, or None for no norm.
    """

    def __init__(
        self,
        *,
        in_features: Sequence[str],
        in_channels: Sequence[int],
        channels: int,
        num_levels: int,
        num_groups: int | None = 32,
    ) -> None:
        super().__init__()
        if len(in_features) != len(in_channels):
            raise ConfigError(
                f"neck.in_features names {len(in_features)} maps, "
                f"but neck.in_channels has {len(in_channels)} entries"
            )
        if num_levels < len(in_features):
            raise ConfigError(
                f"neck.num_levels={num_levels} is smaller than the number of backbone maps "
                f"({len(in_features)}): name fewer in_features"
            )
        self.in_features = list(in_features)
        self.in_channels = list(in_channels)
        self.num_levels = num_levels
        self.convs = nn.ModuleList(
            _conv_norm(before, channels, num_groups, kernel_size=1) for before in in_channels
        )
        extra = num_levels - len(in_features)
        extra_channels = [in_channels[-1], *[channels] * extra][:extra]
        self.extra_convs = nn.ModuleList(
            _conv_norm(before, channels, num_groups, kernel_size=3, stride=2)
            for before in extra_channels
        )

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Map a dict of (B, C_in, H_l, W_l) to a list of (B, C, H_l, W_l), finest first."""
        maps = [features[name] for name in self.in_features]
        outputs = [conv(feature) for conv, feature in zip(self.convs, maps, strict=True)]
        previous = maps[-1]
        for conv in self.extra_convs:
            previous = conv(previous)
            outputs.append(previous)
        return outputs


def _conv_norm(
    in_channels: int, channels: int, num_groups: int | None, *, kernel_size: int, stride: int = 1
) -> Conv2d:
    conv = Conv2d(
        in_channels,
        channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        norm=None if num_groups is None else nn.GroupNorm(num_groups, channels),
    )
    if num_groups is not None:  # without a norm the published models keep torch's start
        nn.init.xavier_uniform_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    return conv
