"""What `sampling_points` draws, recorded from a model: where one block of a DAT looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from detectron2.utils.registry import locate
from numpy.typing import NDArray
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from efficient_detr.errors import UserError
from efficient_detr.modeling.backbones.dat import DAT, STRIDES
from efficient_detr.modeling.backbones.deformable_attention import DeformableMapAttention
from efficient_detr.modeling.backbones.deformed_keys import SINGLE_POSITION, DeformedKeys
from efficient_detr.visualization.figures import Image
from efficient_detr.visualization.sampling_points import AttendedPoints, SamplingExample
from efficient_detr.visualization.tokens import rgb_image

__all__ = [
    "SamplingRecorder",
    "check_deformable_block",
    "check_fractions",
    "deformable_blocks_of_config",
    "pixels_of_points",
]

Blocks = list[list[bool]]  # for each stage, which blocks have deformable attention


class SamplingRecorder:
    """Context manager that records what one block of a DAT sees, one image at a time.

    Args:
        model: any model with a `DAT` inside that takes Detectron2's input dicts; the first DAT is
            watched.
        stage: index of the stage, 0 to 3.
        block: index of the block in its stage; negative from the last.
        group: index of the group to show; None for all.
        head: index of the head whose weights are shown; None for the mean over a group's heads.

    Raises:
        UserError: if there is no such block, group or head, or its keys are not deformed.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: int,
        block: int = -1,
        *,
        group: int | None = None,
        head: int | None = None,
    ) -> None:
        found = [module for module in model.modules() if isinstance(module, DAT)]
        if not found:
            raise UserError(
                "This model has no DAT, whose sampling points could be drawn: choose a config "
                "such as configs/focus_detr_dat_tiny.py."
            )
        self.model, self.backbone = model, found[0]
        block = check_deformable_block(_deformable_blocks(self.backbone), stage, block)
        self.title = f"stage {stage}, block {block}"
        blocks = cast(nn.ModuleList, self.backbone.stages[stage].blocks)
        self.attention = cast(DeformableMapAttention, blocks[block].attention)
        self.keys = cast(DeformedKeys, self.attention.keys)
        self.head = _checked(head, "head", self.attention.num_heads)
        self.groups = self._chosen_groups(group)
        self.images: list[Image] = []
        self.features: Tensor | None = None
        # Also where a side is no multiple of it: stages drop a part of a cell, or fill it up.
        self.stride = STRIDES[stage]

    def __enter__(self) -> SamplingRecorder:
        self._handles = [
            self.model.register_forward_pre_hook(self._keep_images),
            self.attention.register_forward_pre_hook(self._keep_features),
        ]
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def heads_of_group(self) -> int:
        """Heads that share the points of a group."""
        return self.attention.num_heads // self.keys.num_groups

    @torch.no_grad()
    def example(self, queries: Sequence[tuple[float, float]]) -> SamplingExample:
        """The sampling points on the last image that the model saw.

        Args:
            queries: places (x, y) as fractions of the image's width and height, 0 to 1; each stands
                for the cell of the map that it falls into.

        Raises:
            UserError: if the model saw no image, or several at once, or a query is no fraction.
        """
        check_fractions(queries)
        if self.features is None or len(self.images) != 1:
            raise UserError("No sampling points to draw: the model must see one image at a time.")
        (image,), features = self.images, self.features
        shape = (features.shape[1], features.shape[2])
        cells = [self._cell(image, shape, query) for query in queries]
        tokens = self.keys(features, self.attention.query(features))
        indices = torch.tensor([y * shape[1] + x for x, y in cells], device=features.device)
        weights = self.attention.attention_weights(features, indices)[0][0]  # (H, n, M)
        assert tokens.points is not None
        middles = (np.array(cells, dtype=np.float64) + 0.5) * self.stride
        return SamplingExample(
            image=image,
            title=self.title,
            groups=self.groups,
            map_shape=tokens.map_shape,
            references=pixels_of_points(self._references(tokens.map_shape), shape, self.stride),
            points=pixels_of_points(tokens.points[0, list(self.groups)], shape, self.stride),
            attended=tuple(
                AttendedPoints(middle, self._weights(weights[:, index]))
                for index, middle in enumerate(middles)
            ),
            weights_of="mean over heads" if self.head is None else f"head {self.head}",
        )

    def _references(self, map_shape: tuple[int, int]) -> Tensor:
        """(M, 2) normalised points (x, y) of the reference grid, row by row."""
        device = torch.device("cpu")
        y, x = (self.keys.grid.key_positions(length, device) for length in map_shape)
        # The grid of DAT++ has no finite place for a single key; its limit puts it there.
        return torch.cartesian_prod(y, x).flip(1).nan_to_num(posinf=SINGLE_POSITION)

    def _chosen_groups(self, group: int | None) -> tuple[int, ...]:
        """The group that was asked for, that of the head, or all."""
        group = _checked(group, "group", self.keys.num_groups)
        if self.head is None:
            return tuple(range(self.keys.num_groups)) if group is None else (group,)
        own = self.head // self.heads_of_group
        if group not in (None, own):
            raise UserError(f"Head {self.head} belongs to group {own}, not to group {group}.")
        return (own,)

    def _cell(
        self, image: Image, shape: tuple[int, int], query: tuple[float, float]
    ) -> tuple[int, int]:
        """The cell (x, y) of a map (H, W) that a query falls into."""
        height, width = image.shape[:2]
        pixel = np.array(query) * (width, height)
        x, y = (pixel / self.stride).astype(int).tolist()
        # The right and the lower border belong to the last cell, as does what the map leaves out.
        last_x, last_y = -(-width // self.stride) - 1, -(-height // self.stride) - 1
        return min(x, last_x, shape[1] - 1), min(y, last_y, shape[0] - 1)

    def _weights(self, weights: Tensor) -> NDArray[np.float64]:
        """(G, M) weights of the shown groups from (H, M) of all heads."""
        if self.head is not None:
            shown = weights[self.head][None]
        else:
            shown = weights.unflatten(0, (-1, self.heads_of_group)).mean(1)[list(self.groups)]
        return shown.double().cpu().numpy()

    def _keep_images(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model."""
        input_format = str(getattr(module, "input_format", "RGB"))
        self.images = [rgb_image(inputs["image"], input_format) for inputs in args[0]]

    def _keep_features(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the attention."""
        self.features = args[0].detach()


def pixels_of_points(points: Tensor, shape: tuple[int, int], stride: int) -> NDArray[np.float64]:
    """Pixels of an image from the normalised points of a feature map.

    -1 and 1 are the middles of the first and last cell. The map need not cover the image exactly:
    where a side is no multiple of the stride, DAT drops its last pixels, and the last cell of DAT++
    reaches beyond it.

    Args:
        points: (..., 2) points (x, y).
        shape: (H, W) of the map that they sample.
        stride: side of a cell, in pixels.

    Returns:
        (..., 2) places (x, y), where pixel i reaches from i to i + 1.
    """
    cells = np.array(shape[::-1], dtype=np.float64)
    place = (points.double().cpu().numpy() + 1) / 2 * (cells - 1)
    return (place + 0.5) * stride


# Checks ------------------------------------------------------------------------------------------


def check_fractions(queries: Sequence[tuple[float, float]]) -> None:
    """Check places on an image.

    Raises:
        UserError: if one lies outside.
    """
    for x, y in queries:
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(
                f"The query {x:g} {y:g} lies outside the image: give x and y as fractions of its "
                "width and height, 0 to 1."
            )


def check_deformable_block(blocks: Blocks, stage: int, block: int) -> int:
    """Check that a block has deformable attention.

    Args:
        blocks: for each stage, which blocks have it.
        stage: index of the stage.
        block: index of the block; negative from the last.

    Returns:
        The index of the block, from 0.

    Raises:
        UserError: if there is no such block, or it has another kind of attention; the message names
            those that have it.
    """
    if 0 <= stage < len(blocks) and -len(blocks[stage]) <= block < len(blocks[stage]):
        block %= len(blocks[stage])
        if blocks[stage][block]:
            return block
    places = [
        f"{', '.join(str(index) for index, one in enumerate(each) if one)} of stage {number}"
        for number, each in enumerate(blocks)
        if any(each)
    ]
    where = f"blocks {'; '.join(places)} have it" if places else "no block of this model has it"
    raise UserError(f"Block {block} of stage {stage} has no deformed sampling points: {where}.")


def _deformable_blocks(backbone: DAT) -> Blocks:
    return [
        [
            isinstance(block.attention, DeformableMapAttention)
            and isinstance(block.attention.keys, DeformedKeys)
            for block in cast(nn.ModuleList, stage.blocks)
        ]
        for stage in backbone.stages
    ]


def deformable_blocks_of_config(config: Any) -> Blocks | None:
    """Find out before a model is built where it has deformable attention.

    Args:
        config: LazyConfig of a model, or what stands in its place.

    Returns:
        For each stage of the first `DAT`, which blocks have it; None if the config does not show
        the parts of one.
    """
    for node in _nodes(config):
        if _builds(node, DAT) and isinstance(node.get("stages"), ListConfig):
            return [
                [
                    _builds(block.attention, DeformableMapAttention)
                    and _builds(block.attention["keys"], DeformedKeys)
                    for block in stage.blocks
                ]
                for stage in node.stages
            ]
    return None


def _nodes(node: Any) -> Iterator[DictConfig]:
    """All nodes of a config that build something."""
    if isinstance(node, DictConfig):
        if "_target_" in node.keys():
            yield node
        for key in node.keys():
            if not OmegaConf.is_missing(node, key):
                yield from _nodes(node[key])
    elif isinstance(node, ListConfig):
        for child in node:
            yield from _nodes(child)


def _builds(node: Any, part: type) -> bool:
    """Whether a node builds an object of a class."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    target = locate(target) if isinstance(target, str) else target
    return isinstance(target, type) and issubclass(target, part)


def _checked(index: int | None, name: str, count: int) -> int | None:
    if index is not None and not 0 <= index < count:
        raise UserError(f"There is no {name} {index}: {name}s are 0 to {count - 1}.")
    return index
