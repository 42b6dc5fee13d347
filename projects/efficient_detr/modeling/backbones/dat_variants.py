"""The published variants of DAT and DAT++ as data, and the LazyConfigs that they stand for.

A variant is a table of stages. A stage has a letter for the attention of each block: L local
windows, S shifted windows, N neighbourhood, D deformable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from omegaconf import DictConfig

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.dat import DAT, FEATURES, STRIDES, DATBlock, DATStage
from efficient_detr.modeling.backbones.dat_stems import (
    ConvolutionalMerging,
    ConvolutionalStem,
    PatchMerging,
    PatchStem,
)
from efficient_detr.modeling.backbones.deformable_attention import DeformableMapAttention
from efficient_detr.modeling.backbones.deformed_keys import (
    BoundedOffsets,
    ClampedPoints,
    DeformedKeys,
    ExtendedGrid,
    HalfPixelGrid,
)
from efficient_detr.modeling.backbones.map_layers import (
    MapFeedForward,
    ResidualDepthwiseConvolution,
)
from efficient_detr.modeling.backbones.neighborhood_attention import NeighborhoodAttention
from efficient_detr.modeling.backbones.position_bias import RelativePositionTable
from efficient_detr.modeling.backbones.window_attention import (
    ShiftedWindowAttention,
    WindowAttention,
)

EXPANSION = 4
"""Hidden channels of the feed-forward network for each channel."""


@dataclass(frozen=True)
class StageSpecification:
    """One row of a variant's table.

    Attributes:
        attention: a letter for each block, L, S, N or D.
        channels: C.
        num_heads: H, also of deformable attention.
        num_groups: groups of channels with sampling points of their own (D).
        key_stride: cells between sampled keys (D).
        offset_kernel: side of the offset network's convolution (D).
    """

    attention: str
    channels: int
    num_heads: int
    num_groups: int = 1
    key_stride: int = 1
    offset_kernel: int = 3


@dataclass(frozen=True)
class Variant:
    """A published model.

    Attributes:
        architecture: makes the backbone of the stages; `dat` or `dat_plus_plus`.
        stages: four rows.
        drop_path_rate: of the last block in the ImageNet training.
        image_size: side in pixels of the images that the checkpoint was trained with.
        table_image_size: side of the images that the position tables were made for.
        window: side of local windows and neighbourhoods, in cells.
    """

    architecture: Callable[..., DictConfig]
    stages: tuple[StageSpecification, ...]
    drop_path_rate: float
    image_size: int = 224
    table_image_size: int = 224
    window: int = 7


def dat_backbone(
    variant: str,
    *,
    out_features: Sequence[str] = FEATURES[1:],
    drop_path_rate: float | None = None,
    freeze_at: int = 0,
    gradient_checkpointing: bool = False,
) -> DictConfig:
    """LazyConfig of a published variant.

    Args:
        variant: a name of `VARIANTS`.
        out_features: among "p0" (stride 4) to "p3" (stride 32).
        drop_path_rate: of the last block, rising from 0 in the first; None for that of the ImageNet
            training.
        freeze_at: see `DAT`.
        gradient_checkpointing: see `DAT`.

    Returns:
        The config; `instantiate` makes a `DAT` of it.

    Raises:
        ConfigError: if there is no such variant.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"{variant!r} is no variant of DAT: choose from {', '.join(VARIANTS)}.")
    found = VARIANTS[variant]
    return found.architecture(
        found.stages,
        image_size=found.table_image_size,
        window=found.window,
        drop_path_rate=found.drop_path_rate if drop_path_rate is None else drop_path_rate,
        out_features=list(out_features),
        freeze_at=freeze_at,
        gradient_checkpointing=gradient_checkpointing,
    )


def dat(
    stages: Sequence[StageSpecification],
    *,
    image_size: int = 224,
    window: int = 7,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> DictConfig:
    """LazyConfig of a DAT as of 2022: patches, plain networks, offsets bounded by one key.

    Args:
        stages: table of four stages.
        image_size: side in pixels of the images that the position tables are made for.
        window: side of local windows, in cells.
        drop_path_rate: of the last block, rising from 0 in the first.
        options: further arguments of `DAT`.

    Raises:
        ConfigError: if there are not four stages, or a letter stands for nothing.
    """

    def block(stage: StageSpecification, letter: str, map_size: int, drop_path: float) -> Any:
        keys = _keys(stage, L(HalfPixelGrid)(), L(BoundedOffsets)(range_factor=2.0))
        return _block(stage, _attention(stage, letter, window, map_size, keys), drop_path)

    stem = L(PatchStem)(channels=stages[0].channels)
    return _dat(stages, image_size, drop_path_rate, stem, PatchMerging, block, options)


def dat_plus_plus(
    stages: Sequence[StageSpecification],
    *,
    image_size: int = 224,
    window: int = 7,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> DictConfig:
    """LazyConfig of a DAT++ as of 2023: convolutions everywhere, points clamped to the map.

    Arguments and errors are those of `dat`.
    """

    def block(stage: StageSpecification, letter: str, map_size: int, drop_path: float) -> Any:
        keys = _keys(stage, L(ExtendedGrid)(), L(ClampedPoints)())
        return _block(
            stage,
            _attention(stage, letter, window, map_size, keys),
            drop_path,
            mixing=L(ResidualDepthwiseConvolution)(channels=EXPANSION * stage.channels),
            local_perception=L(ResidualDepthwiseConvolution)(channels=stage.channels),
        )

    stem = L(ConvolutionalStem)(channels=stages[0].channels)
    return _dat(stages, image_size, drop_path_rate, stem, ConvolutionalMerging, block, options)


def _dat(
    stages: Sequence[StageSpecification],
    image_size: int,
    drop_path_rate: float,
    stem: Any,
    merging: type,
    block: Callable[[StageSpecification, str, int, float], Any],
    options: dict[str, Any],
) -> DictConfig:
    """Put blocks together; the drop path rate rises evenly over all of them."""
    if len(stages) != len(FEATURES):
        raise ConfigError(f"stages of DAT must be four rows, but are {len(stages)}.")
    if not all(stage.attention for stage in stages):
        raise ConfigError("A stage of DAT has attention='': give a letter for each block.")
    depth = sum(len(stage.attention) for stage in stages)
    rates = iter(drop_path_rate * index / max(depth - 1, 1) for index in range(depth))
    reductions = [stem] + [
        L(merging)(in_channels=before.channels, channels=after.channels)
        for before, after in pairwise(stages)
    ]
    return L(DAT)(
        stages=[
            L(DATStage)(
                blocks=[
                    block(stage, letter, image_size // stride, next(rates))
                    for letter in stage.attention
                ],
                channels=stage.channels,
                merging=reduction,
            )
            for stage, stride, reduction in zip(stages, STRIDES, reductions, strict=True)
        ],
        **options,
    )


def _block(
    stage: StageSpecification,
    attention: Any,
    drop_path: float,
    mixing: Any = None,
    local_perception: Any = None,
) -> Any:
    """A block; the last two are what DAT++ adds."""
    return L(DATBlock)(
        attention=attention,
        feedforward=L(MapFeedForward)(
            channels=stage.channels, hidden_channels=EXPANSION * stage.channels, mixing=mixing
        ),
        channels=stage.channels,
        local_perception=local_perception,
        drop_path=drop_path,
    )


def _keys(stage: StageSpecification, grid: Any, limit: Any) -> Any:
    return L(DeformedKeys)(
        channels=stage.channels,
        num_groups=stage.num_groups,
        kernel_size=stage.offset_kernel,
        stride=stage.key_stride,
        grid=grid,
        limit=limit,
    )


def _attention(
    stage: StageSpecification, letter: str, window: int, map_size: int, keys: Any
) -> Any:
    """The part that a letter stands for."""
    heads = dict(channels=stage.channels, num_heads=stage.num_heads)
    if letter == "L":
        return L(WindowAttention)(**heads, window=window)
    if letter == "S":
        return L(ShiftedWindowAttention)(**heads, window=window)
    if letter == "N":
        return L(NeighborhoodAttention)(**heads, kernel_size=window)
    if letter == "D":
        return L(DeformableMapAttention)(
            **heads,
            keys=keys,
            position_bias=L(RelativePositionTable)(
                num_heads=stage.num_heads, map_shape=(map_size, map_size)
            ),
        )
    raise ConfigError(f"attention {stage.attention!r} of a DAT stage: letters are L, S, N and D.")


def _dat_stages(width: int, heads: int, groups: int, depth: int) -> tuple[StageSpecification, ...]:
    """Rows of a DAT of 2022: `width` channels and `heads` at stride 4, `depth` blocks at 16."""
    return (
        StageSpecification("LS", width, heads),
        StageSpecification("LS", 2 * width, 2 * heads),
        StageSpecification(
            "LD" * (depth // 2), 4 * width, 4 * heads, num_groups=groups, offset_kernel=5
        ),
        StageSpecification("LD", 8 * width, 8 * heads, num_groups=2 * groups, offset_kernel=3),
    )


def _dat_plus_plus_stages(
    width: int, heads: int, groups: tuple[int, int, int, int]
) -> tuple[StageSpecification, ...]:
    """Rows of a DAT++: as many sampled keys at each stride, so fewer cells between them later."""
    attention = ("ND", "NDND", "ND" * 9, "DD")
    return tuple(
        StageSpecification(
            letters,
            width * 2**i,
            heads * 2**i,
            groups[i],
            key_stride=8 // 2**i,
            offset_kernel=9 - 2 * i,
        )
        for i, letters in enumerate(attention)
    )


VARIANTS: dict[str, Variant] = {
    "dat_tiny": Variant(dat, _dat_stages(96, 3, 3, depth=6), 0.2),
    "dat_small": Variant(dat, _dat_stages(96, 3, 3, depth=18), 0.3),
    "dat_base": Variant(dat, _dat_stages(128, 4, 4, depth=18), 0.5),
    "dat_base_384": Variant(
        dat,
        _dat_stages(128, 4, 4, depth=18),
        0.5,
        image_size=384,
        table_image_size=384,
        window=12,
    ),
    "dat_plus_plus_tiny": Variant(dat_plus_plus, _dat_plus_plus_stages(64, 2, (1, 2, 4, 8)), 0.2),
    "dat_plus_plus_small": Variant(dat_plus_plus, _dat_plus_plus_stages(96, 3, (1, 2, 3, 6)), 0.4),
    "dat_plus_plus_base": Variant(dat_plus_plus, _dat_plus_plus_stages(128, 4, (2, 4, 8, 16)), 0.7),
    # Its tables were not resized: they are sampled by relative position at any size.
    "dat_plus_plus_base_384": Variant(
        dat_plus_plus, _dat_plus_plus_stages(128, 4, (2, 4, 8, 16)), 0.6, image_size=384
    ),
}
"""The published models by name."""


def add_dat_config(cfg: Any) -> None:
    """Add `MODEL.DAT` to a config of Detectron2's older kind (yacs).

    Args:
        cfg: what Detectron2's `get_cfg()` returns. MODEL.DAT gets VARIANT (a name of `VARIANTS`),
            OUT_FEATURES (among "p0" to "p3") and DROP_PATH_RATE (None for the variant's own).
    """
    defaults = {
        "VARIANT": "dat_tiny",
        "OUT_FEATURES": list(FEATURES[1:]),
        "DROP_PATH_RATE": None,
    }
    cfg.MODEL.DAT = type(cfg.MODEL)(defaults)


@BACKBONE_REGISTRY.register()
def build_dat_backbone(cfg: Any, input_shape: ShapeSpec) -> DAT:
    """Build DAT for configs of Detectron2's older kind (yacs), as `MODEL.BACKBONE.NAME`.

    Args:
        cfg: a config with what `add_dat_config` adds, and MODEL.BACKBONE.FREEZE_AT.
        input_shape: of the images; its channels must be 3.

    Raises:
        ConfigError: if MODEL.DAT is missing, there is no such variant, or images have another
            number of channels.
    """
    if not hasattr(cfg.MODEL, "DAT"):
        raise ConfigError(
            "The config has no MODEL.DAT: call add_dat_config(cfg) of "
            "efficient_detr.modeling.backbones before the config file is merged."
        )
    if input_shape.channels != 3:
        raise ConfigError(f"DAT takes images of 3 channels, but they have {input_shape.channels}.")
    node = dat_backbone(
        cfg.MODEL.DAT.VARIANT,
        out_features=cfg.MODEL.DAT.OUT_FEATURES,
        drop_path_rate=cfg.MODEL.DAT.DROP_PATH_RATE,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    backbone: DAT = instantiate(node)
    return backbone
