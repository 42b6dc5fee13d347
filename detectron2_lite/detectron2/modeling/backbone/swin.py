"""Swin Transformer (arXiv:2103.14030). Maps are channels-last between the modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .backbone import Backbone

Norm = Callable[[int], nn.Module]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def _pad(maps: Tensor, height: int, width: int) -> Tensor:
    """Zeros below and to the right of (B, H, W, C), up to multiples of the given sides."""
    return F.pad(maps, (0, 0, 0, -maps.shape[2] % width, 0, -maps.shape[1] % height))


def _windows(maps: Tensor, size: int) -> Tensor:
    """Maps (B, H, W, C) to the tokens of their windows (B, windows, size * size, C)."""
    split = maps.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _from_windows(tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`_windows`."""
    split = tokens.unflatten(1, (height // size, width // size)).unflatten(3, (size, size))
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _shift_mask(height: int, width: int, size: int, device: torch.device) -> Tensor:
    """(windows, size ** 2, size ** 2): -100 between tokens that only the shift made neighbours."""

    def bands(length: int) -> Tensor:
        position = torch.arange(length, device=device)
        return (position >= length - size).long() + (position >= length - size // 2)

    region = 3 * bands(height)[:, None] + bands(width)
    tokens = _windows(region[None, :, :, None], size)[0]
    return (tokens != tokens.transpose(1, 2)) * -100.0


class _DropPath(nn.Module):
    """In training, zeroes a branch for random images and scales it up for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        keep = 1 - self.rate
        kept = branch.new_empty((len(branch),) + (1,) * (branch.dim() - 1)).bernoulli_(keep)
        return branch * (kept.div_(keep) if keep > 0 else kept)


class _WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias for each displacement of key and query."""

    relative_position_index: Tensor

    def __init__(
        self,
        channels: int,
        heads: int,
        size: int,
        qkv_bias: bool,
        scale: float | None,
        attention_dropout: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.scale = scale or (channels // heads) ** -0.5
        side = 2 * size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(side * side, heads))
        place = torch.arange(size)
        coordinates = torch.cartesian_prod(place, place)
        # Row and column of the table are the displacements, counted from the most negative one.
        row, column = (coordinates[:, None] - coordinates + size - 1).unbind(-1)
        self.register_buffer("relative_position_index", row * side + column)
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attention_dropout)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within each window of (B, windows, tokens, C)."""
        projected = self.qkv(tokens).unflatten(3, (3, self.heads, -1))
        query, key, value = projected.permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        logits = (query * self.scale) @ key.transpose(-2, -1) + bias
        if mask is not None:
            logits = logits + mask[:, None].to(logits.dtype)
        attended = self.attn_drop(logits.softmax(-1)) @ value
        return self.proj_drop(self.proj(attended.transpose(2, 3).flatten(3)))


class _Block(nn.Module):
    """Window attention and a feed-forward network, each after a norm and with a residual."""

    def __init__(
        self,
        attention: _WindowAttention,
        mlp_ratio: float,
        drop_path: float,
        shift: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        channels, dropout = attention.proj.in_features, attention.proj_drop.p
        self.shift, hidden = shift, int(channels * mlp_ratio)
        self.norm1 = norm(channels)
        self.attn = attention
        self.drop_path = _DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm(channels)
        layers: OrderedDict[str, nn.Module] = OrderedDict(fc1=nn.Linear(channels, hidden))
        layers.update(act=nn.GELU(), drop1=nn.Dropout(dropout))
        layers.update(fc2=nn.Linear(hidden, channels), drop2=nn.Dropout(dropout))
        self.mlp = nn.Sequential(layers)

    def forward(self, maps: Tensor, mask: Tensor) -> Tensor:
        maps = maps + self.drop_path(self._attend(self.norm1(maps), mask))
        return maps + self.drop_path(self.mlp(self.norm2(maps)))

    def _attend(self, maps: Tensor, mask: Tensor) -> Tensor:
        """Zeros that pad the map to whole windows are attended to like any other cell."""
        height, width = maps.shape[1:3]
        size = self.attn.size
        padded = _pad(maps, size, size)
        if self.shift:
            padded = padded.roll((-self.shift, -self.shift), (1, 2))
        tokens = self.attn(_windows(padded, size), mask if self.shift else None)
        padded = _from_windows(tokens, size, *padded.shape[1:3])
        if self.shift:
            padded = padded.roll((self.shift, self.shift), (1, 2))
        return padded[:, :height, :width]


class _PatchMerging(nn.Module):
    """Joins 2x2 cells and doubles the channels; an odd map gets a row or column of zeros."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = norm(4 * channels)

    def forward(self, maps: Tensor) -> Tensor:
        maps = _pad(maps, 2, 2)
        # In the weights' order: down the left column, then down the right one.
        corners = [maps[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class _Stage(nn.Module):
    """Blocks of one resolution; those with a shift need a mask for the size of the map."""

    def __init__(self, blocks: Sequence[_Block], downsample: _PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.size = blocks[0].attn.size

    def forward(self, maps: Tensor, use_checkpoint: bool) -> Tensor:
        height, width = (side + -side % self.size for side in maps.shape[1:3])
        mask = _shift_mask(height, width, self.size, maps.device)
        for block in self.blocks:
            if use_checkpoint:
                maps = checkpoint(block, maps, mask, use_reentrant=False)
            else:
                maps = block(maps, mask)
        return maps


class _PatchEmbedding(nn.Module):
    """Images (B, channels, H, W), padded to whole patches, to (B, H / patch, W / patch, C)."""

    def __init__(
        self, patch: tuple[int, int], inputs: int, channels: int, norm: Norm | None
    ) -> None:
        super().__init__()
        self.patch_size = patch
        self.proj = nn.Conv2d(inputs, channels, patch, stride=patch)
        self.norm = None if norm is None else norm(channels)

    def forward(self, images: Tensor) -> Tensor:
        padded = _pad(images.permute(0, 2, 3, 1), *self.patch_size)
        maps = self.proj(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return maps if self.norm is None else self.norm(maps)


class SwinTransformer(Backbone):
    """Swin Transformer; ``p{i}`` is the output of stage i, with stride 4 * 2**i.

    Images of any size are padded inside, so ``size_divisibility`` is 0. (The real one's raises
    AttributeError; callers that guard against it with 0 get the same from both.)

    ``frozen_stages`` >= 0 freezes the patch embedding, >= 1 also the absolute position embedding
    (``ape``), >= 2 the first ``frozen_stages - 1`` stages.
    """

    def __init__(
        self,
        pretrain_img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: Norm = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.num_layers = len(depths)
        self.ape, self.out_indices = ape, out_indices
        self.frozen_stages, self.use_checkpoint = frozen_stages, use_checkpoint
        patch = _pair(patch_size)
        norm = norm_layer if patch_norm else None
        self.patch_embed = _PatchEmbedding(patch, in_chans, embed_dim, norm)
        if ape:
            grid = [
                side // step for side, step in zip(_pair(pretrain_img_size), patch, strict=True)
            ]
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, *grid))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.num_features = [embed_dim * 2**index for index in range(self.num_layers)]
        self.layers = nn.ModuleList()
        dropouts = (attn_drop_rate, drop_rate)
        for channels, depth, heads in zip(self.num_features, depths, num_heads, strict=False):
            blocks = []
            for number in range(depth):
                attention = _WindowAttention(
                    channels, heads, window_size, qkv_bias, qk_scale, *dropouts
                )
                shift = window_size // 2 if number % 2 else 0
                blocks.append(_Block(attention, mlp_ratio, next(rates), shift, norm_layer))
            last = len(self.layers) == self.num_layers - 1
            merging = None if last else _PatchMerging(channels, norm_layer)
            self.layers.append(_Stage(blocks, merging))
        self._out_features = [f"p{index}" for index in out_indices]
        self._out_feature_channels, self._out_feature_strides = {}, {}
        for index, name in zip(out_indices, self._out_features, strict=True):
            self._out_feature_channels[name] = channels = self.num_features[index]
            self._out_feature_strides[name] = 4 * 2**index
            self.add_module(f"norm{index}", norm_layer(channels))
        self.apply(self._initialize)
        self._freeze_stages()

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        """Norms start as PyTorch leaves them, and so does the convolution."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _freeze_stages(self) -> None:
        """Like the real one's, a later call of ``train()`` undoes the evaluation mode."""
        frozen: list[nn.Module] = [self.patch_embed] if self.frozen_stages >= 0 else []
        if self.frozen_stages >= 1 and self.ape:
            self.absolute_pos_embed.requires_grad = False
        if self.frozen_stages >= 2:
            self.pos_drop.eval()
            frozen += self.layers[: self.frozen_stages - 1]
        for module in frozen:
            module.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, in_chans, H, W) to normalised maps whose sides are rounded up."""
        maps = self.patch_embed(x)
        if self.ape:
            size = tuple(maps.shape[1:3])
            position = F.interpolate(self.absolute_pos_embed, size=size, mode="bicubic")
            maps = maps + position.permute(0, 2, 3, 1)
        maps = self.pos_drop(maps)
        outputs = {}
        for index, stage in enumerate(self.layers):
            assert isinstance(stage, _Stage)
            maps = stage(maps, self.use_checkpoint)
            if index in self.out_indices:
                normalized = getattr(self, f"norm{index}")(maps)
                outputs[f"p{index}"] = normalized.permute(0, 3, 1, 2).contiguous()
            if stage.downsample is not None:
                maps = stage.downsample(maps)
        return outputs
