"""Normalisation layers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = str | Callable[[int], nn.Module] | None


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation of constant buffers, which are named as in ``nn.BatchNorm2d``.

    A fresh layer is the identity: the variance starts at ``1 - eps``.
    """

    _version = 3  # of the state dict, as written by Detectron2

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        if not x.requires_grad:
            statistics = (self.running_mean, self.running_var)
            return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        # F.batch_norm would compute gradients for its statistics too, at the price of memory.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)

    def __repr__(self) -> str:
        return f"FrozenBatchNorm2d(num_features={self.num_features}, eps={self.eps})"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Freeze every (Sync)BatchNorm inside ``module`` in place; a norm itself is replaced."""
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            frozen = cls(module.num_features, module.eps)
            frozen.load_state_dict(module.state_dict(), strict=False)
            return frozen.to(module.weight.device)
        for name, child in module.named_children():
            setattr(module, name, cls.convert_frozen_batchnorm(child))
        return module


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W), for each position by itself."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "nnSyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": partial(nn.GroupNorm, 32),
    "LN": partial(LayerNorm, eps=1e-6),
}


def get_norm(norm: Norm, out_channels: int) -> nn.Module | None:
    """The layer for a name or a callable; None for None and "". Unknown names raise KeyError."""
    if norm is None or norm == "":
        return None
    return (_NORMS[norm] if isinstance(norm, str) else norm)(out_channels)
