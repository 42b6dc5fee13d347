"""Normalisation layers of convolutional backbones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine parameters are constant buffers.

    The buffers are named as in ``nn.BatchNorm2d``, so weights of either load into the other. A
    fresh layer is the identity: the variance starts at ``1 - eps``.
    """

    _version = 3  # of the state dict, as written by Detectron2

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        if not x.requires_grad:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        # F.batch_norm would compute gradients for its statistics too, at the price of memory.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        # Files before version 2 hold weight and bias only: statistics were folded into them.
        if (local_metadata.get("version") or 1) < 2:
            state_dict.setdefault(prefix + "running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(prefix + "running_var", torch.ones_like(self.running_var))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __repr__(self) -> str:
        return f"FrozenBatchNorm2d(num_features={self.num_features}, eps={self.eps})"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Freeze every (Sync)BatchNorm inside ``module`` in place; a norm itself is replaced."""
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            frozen = cls(module.num_features, module.eps)
            for name in ("weight", "bias") if module.affine else ():
                setattr(frozen, name, getattr(module, name).detach().clone())
            assert module.running_mean is not None and module.running_var is not None
            frozen.running_mean, frozen.running_var = module.running_mean, module.running_var
            frozen.num_batches_tracked = module.num_batches_tracked
            return frozen
        for name, child in module.named_children():
            converted = cls.convert_frozen_batchnorm(child)
            if converted is not child:
                module.add_module(name, converted)
        return module


class LayerNorm(nn.Module):
    """Layer normalisation over the channels of (B, C, H, W), for each position by itself."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps
        self.normalized_shape = (normalized_shape,)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        centred = x - x.mean(1, keepdim=True)
        normalised = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * normalised + self.bias[:, None, None]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


Norm = str | Callable[[int], nn.Module] | None
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "nnSyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": _group_norm,
    "LN": LayerNorm,
}


def get_norm(norm: Norm, out_channels: int) -> nn.Module | None:
    """The norm layer for ``out_channels`` channels; None for None and the empty string.

    ``norm`` is BN, SyncBN, FrozenBN, GN (32 groups), LN, or a callable that takes the channels;
    other names raise KeyError.
    """
    if norm is None or norm == "":
        return None
    return (_NORMS[norm] if isinstance(norm, str) else norm)(out_channels)
