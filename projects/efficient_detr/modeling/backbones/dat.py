"""Vision Transformer with Deformable Attention, as a Detectron2 backbone.

The 2022 models (DAT, arXiv 2201.00520) and the 2023 models (DAT++, arXiv 2309.01430) are built from
the same blocks with different parts; `efficient_detr.modeling.backbones.dat_variants` has the
tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import cast

from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.map_attention import MapAttention
from efficient_detr.modeling.backbones.map_layers import DropPath, LayerScale

FEATURES = ("p0", "p1", "p2", "p3")
"""Names of the stages' outputs, those of Detectron2's Swin: stage index, not pyramid level."""

STRIDES = (4, 8, 16, 32)
"""Pixels a cell in each stage."""


class DATBlock(nn.Module):
    """Attention and feed-forward network, each behind a norm and with a residual.

    Args:
        attention: one of the four kinds of attention.
        feedforward: network on the map (B, H, W, C).
        channels: C.
        local_perception: module before the attention, on the map (B, H, W, C), residual included;
            None for none.
        drop_path: probability of dropping a branch in training.
        layer_scale: initial factor of the branches; None for branches without factors.
    """

    def __init__(
        self,
        *,
        attention: MapAttention,
        feedforward: nn.Module,
        channels: int,
        local_perception: nn.Module | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.local_perception = local_perception
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = attention
        self.feedforward_norm = nn.LayerNorm(channels)
        self.feedforward = feedforward
        self.drop_path = DropPath(probability=drop_path)
        self.attention_scale = _layer_scale(channels, layer_scale)
        self.feedforward_scale = _layer_scale(channels, layer_scale)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        if self.local_perception is not None:
            features = self.local_perception(features)
        attended = self.attention(self.attention_norm(features))
        features = features + self.drop_path(self.attention_scale(attended))
        branch = self.feedforward(self.feedforward_norm(features))
        return features + self.drop_path(self.feedforward_scale(branch))


def _layer_scale(channels: int, initial_value: float | None) -> nn.Module:
    if initial_value is None:
        return nn.Identity()
    return LayerScale(channels=channels, initial_value=initial_value)


class DATStage(nn.Module):
    """Blocks at one resolution.

    Args:
        blocks: at least one.
        channels: C.
        merging: reduces the map of the stage before, the stem for the first stage.
        in_channels: channels that `merging` gives; another number than C adds a linear layer.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[DATBlock],
        channels: int,
        merging: nn.Module,
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.merging = merging
        same = in_channels is None or in_channels == channels
        self.projection = nn.Identity() if same else nn.Linear(cast(int, in_channels), channels)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, features: Tensor, gradient_checkpointing: bool = False) -> Tensor:
        """Map the output of the stage before, (B, H', W', C'), to (B, H, W, C).

        Args:
            features: an image (B, H', W', 3) for the first stage.
            gradient_checkpointing: whether to recompute blocks in the backward pass.
        """
        features = self.projection(self.merging(features))
        for block in self.blocks:
            if gradient_checkpointing:
                features = checkpoint(block, features, use_reentrant=False)
            else:
                features = block(features)
        return features


class DAT(Backbone):
    """Vision Transformer with Deformable Attention.

    The last stages of the 2022 models attend from every cell to as many sampled cells. No official
    definition of them exists for other sizes than that of the position tables: here windows are
    padded to their size and tables are sampled at the size that they have, which is the official
    model at the official size.

    Maps depend on the whole canvas, padding included: its corners fix the sampling grid. An image
    gives other features in a batch with larger ones than by itself.

    Args:
        stages: four stages; the first one's `merging` is the stem.
        out_features: names among "p0" (stride 4) to "p3" (stride 32); each gets a norm of its own,
            which ImageNet checkpoints do not have. Stages after the last one neither run nor learn.
        freeze_at: 0 trains all, 1 freezes the stem, 2 also the first stage, up to 5.
        gradient_checkpointing: recompute blocks in the backward pass, for less memory.

    Raises:
        ConfigError: if `out_features` or `freeze_at` names something that is not there.
    """

    def __init__(
        self,
        *,
        stages: Sequence[DATStage],
        out_features: Sequence[str] = FEATURES[1:],
        freeze_at: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if len(stages) != len(FEATURES):
            raise ConfigError(f"backbone.stages of DAT must be four, but are {len(stages)}.")
        names = [] if isinstance(out_features, str) else list(out_features)
        if not names or len(set(names)) != len(names) or not set(names) <= set(FEATURES):
            raise ConfigError(
                f"backbone.out_features={out_features}: name some of {', '.join(FEATURES)}, "
                "each once."
            )
        if freeze_at not in range(len(stages) + 2):
            raise ConfigError(f"backbone.freeze_at={freeze_at}: choose 0 to {len(stages) + 1}.")
        self.stages = nn.ModuleList(stages)
        channels = {name: stage.channels for name, stage in zip(FEATURES, stages, strict=True)}
        self._out_features = [name for name in FEATURES if name in out_features]
        self._out_feature_channels = channels
        self._out_feature_strides = dict(zip(FEATURES, STRIDES, strict=True))
        self.output_norms = nn.ModuleDict(
            {name: nn.LayerNorm(channels[name]) for name in self._out_features}
        )
        self.gradient_checkpointing = gradient_checkpointing
        self.freeze_at = freeze_at
        for module in [*self._frozen(), *self._unused()]:
            module.requires_grad_(False)

    @property
    def size_divisibility(self) -> int:
        """Images should be padded to multiples of this, or border pixels may be dropped."""
        return STRIDES[-1]

    def train(self, mode: bool = True) -> DAT:
        """Switch between training and evaluation; frozen parts stay in evaluation."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Extract features.

        Args:
            images: (B, 3, H, W) normalised; sides should be multiples of 32.

        Returns:
            For each of `out_features` the normalised map (B, C_i, H_i, W_i) in the order of the
            stages. Sides that are no multiple of 32 are rounded down after each stage by the 2022
            models and up by the 2023 models.

        Raises:
            ValueError: if the images are too small for a stage, or there are none.
        """
        if len(images) == 0:
            raise ValueError("DAT got a batch of no images: give it at least one.")
        features, outputs = images.permute(0, 2, 3, 1), {}
        recompute = self.gradient_checkpointing and self.training
        # Stages after the last output wait for another config; see `_unused`.
        for name, stage in zip(FEATURES, self._used(), strict=False):
            features = stage(features, recompute)
            if name in self.output_norms:
                outputs[name] = self.output_norms[name](features).permute(0, 3, 1, 2)
        return outputs

    def _used(self) -> list[nn.Module]:
        """Stages up to the last output."""
        return list(self.stages)[: FEATURES.index(self._out_features[-1]) + 1]

    def _unused(self) -> list[nn.Module]:
        """Stages after the last output: they hold weights of a checkpoint, but do not run."""
        return list(self.stages)[len(self._used()) :]

    def _frozen(self) -> list[nn.Module]:
        """What `freeze_at` freezes; the norm of an output belongs to its stage."""
        frozen: list[nn.Module] = []
        if self.freeze_at > 0:
            frozen.append(cast(DATStage, self.stages[0]).merging)
        num_stages = max(self.freeze_at - 1, 0)
        for name, stage in islice(zip(FEATURES, self.stages, strict=True), num_stages):
            frozen.append(stage)
            if name in self.output_norms:
                frozen.append(self.output_norms[name])
        return frozen
