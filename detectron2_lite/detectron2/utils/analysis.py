"""Counting operations and parameters of detection models."""

from collections.abc import Callable, Mapping
from typing import Any

import fvcore.nn
import torch
from detectron2.structures import Boxes, Instances
from fvcore.nn import parameter_count, parameter_count_table
from torch import nn

__all__ = ["FlopCountAnalysis", "parameter_count", "parameter_count_table"]
# Not reported as uncounted: elementwise, reducing and sorting operators. Those for which fvcore
# has a formula (batch_norm) are counted nevertheless.
_ELEMENTWISE_OPS = """
    add add_ argmax argsort batch_norm constant_pad_nd div div_ exp log2 max_pool2d meshgrid mul
    mul_ neg nonzero_numpy reciprocal repeat_interleave rsub sigmoid sigmoid_ softmax sort sqrt sub
"""
_IGNORED_OPS = [f"aten::{name}" for name in _ELEMENTWISE_OPS.split()] + ["torchvision::nms"]


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples, mappings, Instances and Boxes."""
    if isinstance(value, (torch.Tensor, Boxes)):
        return [value.tensor if isinstance(value, Boxes) else value]
    if isinstance(value, Instances):
        value = value.get_fields()
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return []


class _TracingAdapter(nn.Module):
    """A model of rich inputs and outputs as one of tensors, as the tracer wants it.

    A trace lives for one input, so the rich inputs are kept and the tensors that the tracer passes,
    which are those in the inputs, need no unpacking.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model: Callable[..., Any] = model
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.flattened_inputs = tuple(_tensors_in(self.inputs))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return tuple(_tensors_in(self.model(*self.inputs)))


class FlopCountAnalysis(fvcore.nn.FlopCountAnalysis):
    """fvcore's analysis (in multiply-adds) of models that take list[dict] and return Instances.

    ``inputs`` is one argument or the tuple of all. "model" is the name of the model itself.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        adapter = _TracingAdapter(model, inputs)
        super().__init__(adapter, adapter.flattened_inputs)
        self.set_op_handle(**dict.fromkeys(_IGNORED_OPS))
