"""Situations in which only PyTorch's own operators can take part."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch._C import _functorch
from torch.autograd import forward_ad


def needs_pytorch() -> bool:
    """Whether what runs now could not cope with the project's compiled operators.

    These are exports to ONNX, whose runtimes do not know them, and two ways to differentiate that
    `torch.library` does not serve: forward mode, where derivatives would silently be zero, and the
    transforms of `torch.func`.
    """
    return torch.onnx.is_in_onnx_export() or _is_forward_mode() or _is_differentiating_function()


# Evaluated while tracing; what it looks at cannot be traced.
cast(Any, needs_pytorch)._dynamo_marked_constant = True


def _is_forward_mode() -> bool:
    return bool(forward_ad._current_level >= 0)


def _is_differentiating_function() -> bool:
    """Inside torch.func.grad, vjp or jvp; torch.func.vmap alone is no reason."""
    if _functorch.peek_interpreter_stack() is None:
        return False
    differentiating = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return any(level.key() in differentiating for level in _functorch.get_interpreter_stack())
