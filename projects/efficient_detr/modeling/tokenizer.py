"""Feature maps and the image padding mask -> `FeatureTokens`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.structures import FeatureTokens, SpatialShapes


class FeatureTokenizer(nn.Module):
    """Flatten feature maps to tokens with positions, padding and reference points.

    Args:
        position_embedding: module from a padding mask (B, H, W) to (B, C, H, W).
        num_levels: L.
        chained_levels: number of last levels whose padding mask is resized from the level before
            (as the published SMCA weights expect) instead of from the image.
    """

    def __init__(
        self, *, position_embedding: nn.Module, num_levels: int, chained_levels: int = 0
    ) -> None:
        super().__init__()
        if not 0 <= chained_levels < num_levels:
            raise ConfigError(
                f"tokenizer.chained_levels={chained_levels} must be in [0, num_levels={num_levels})"
            )
        self.position_embedding = position_embedding
        self.num_levels = num_levels
        self.chained_levels = chained_levels

    def forward(self, features: list[Tensor], padding_mask: Tensor) -> FeatureTokens:
        """Build the token sequence.

        Args:
            features: maps (B, C, H_l, W_l), finest first.
            padding_mask: (B, H, W) bool of the input image, True on padding.
        """
        shapes = [(int(f.shape[-2]), int(f.shape[-1])) for f in features]
        masks = self.level_masks(padding_mask, shapes)
        sizes = torch.stack([valid_size(mask) for mask in masks], dim=1)  # (B, L, 2)
        ratios = sizes / torch.tensor(shapes, device=sizes.device).flip(1)
        return FeatureTokens(
            features=torch.cat([f.flatten(2).transpose(1, 2) for f in features], dim=1),
            positions=torch.cat(self.level_positions(masks), dim=1),
            padding_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            spatial_shapes=shapes,
            image_sizes=valid_size(padding_mask),
            valid_ratios=ratios,
            reference_points=reference_points(shapes, ratios),
        )

    def level_masks(self, padding_mask: Tensor, shapes: SpatialShapes) -> list[Tensor]:
        """The padding mask (B, H_l, W_l) of each level."""
        masks: list[Tensor] = []
        for level, shape in enumerate(shapes):
            chained = level >= self.num_levels - self.chained_levels
            masks.append(resize_mask(masks[-1] if chained else padding_mask, shape))
        return masks

    def level_positions(self, masks: list[Tensor]) -> list[Tensor]:
        """Position embeddings (B, S_l, C) of the tokens of each level."""
        return [self.position_embedding(mask).flatten(2).transpose(1, 2) for mask in masks]


class LevelFeatureTokenizer(FeatureTokenizer):
    """Tokens whose position also says their level (Deformable DETR, section 4.1).

    Args:
        channels: C.
        position_embedding: as in `FeatureTokenizer`; likewise the rest.
    """

    def __init__(
        self,
        *,
        position_embedding: nn.Module,
        channels: int,
        num_levels: int,
        chained_levels: int = 0,
    ) -> None:
        super().__init__(
            position_embedding=position_embedding,
            num_levels=num_levels,
            chained_levels=chained_levels,
        )
        self.level_embedding = nn.Parameter(torch.randn(num_levels, channels))

    def level_positions(self, masks: list[Tensor]) -> list[Tensor]:
        """Position embeddings (B, S_l, C), each plus the learned embedding of its level."""
        positions = super().level_positions(masks)
        return [p + level for p, level in zip(positions, self.level_embedding, strict=True)]


def resize_mask(padding_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of a bool mask (B, H, W) to (B, *shape)."""
    return F.interpolate(padding_mask[:, None].float(), size=shape)[:, 0] > 0.5


def valid_size(padding_mask: Tensor) -> Tensor:
    """(B, 2) unpadded (width, height) in cells of a (B, H, W) mask: of its first row and column."""
    valid = ~padding_mask
    return torch.stack([valid[:, 0].sum(1), valid[:, :, 0].sum(1)], dim=-1).float()


def cell_centers(shape: tuple[int, int], device: torch.device) -> Tensor:
    """(H W, 2) centres (x, y) of the cells of a map, in cells: (0.5, 0.5), (1.5, 0.5), ..."""
    rows = torch.arange(shape[0], dtype=torch.float32, device=device) + 0.5
    columns = torch.arange(shape[1], dtype=torch.float32, device=device) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def reference_points(shapes: SpatialShapes, valid_ratios: Tensor) -> Tensor:
    """(B, S, L, 2): each token's centre relative to its unpadded level, seen from every level."""
    points = []
    for level, shape in enumerate(shapes):
        full = torch.tensor([shape[1], shape[0]], device=valid_ratios.device)
        centers = cell_centers(shape, valid_ratios.device)
        points.append(centers / (valid_ratios[:, None, level] * full))
    return torch.cat(points, dim=1)[:, :, None] * valid_ratios[:, None]
