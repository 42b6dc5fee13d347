"""Counting operations, activations and parameters of detection models."""

from collections.abc import Callable, Mapping
from typing import Any

import fvcore.nn
import torch
from detectron2.structures import Boxes, Instances
from fvcore.nn import activation_count, parameter_count, parameter_count_table
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["parameter_count", "parameter_count_table", "FlopCountAnalysis"]

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
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
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


def flop_count_operators(model: nn.Module, inputs: list[Any]) -> dict[str, float]:
    """Billions of multiply-adds by operator, in evaluation mode."""
    was_training = model.training
    counts = FlopCountAnalysis(model.eval(), inputs).by_operator()
    model.train(was_training)
    return {name: count / 1e9 for name, count in counts.items()}


def activation_count_operators(
    model: nn.Module, inputs: list[dict[str, Any]], **kwargs: Any
) -> dict[str, float]:
    """Millions of output elements by operator, in evaluation mode, for a single input, of which
    only "image" is used; ``kwargs`` go to :func:`fvcore.nn.activation_count`.
    """
    assert len(inputs) == 1, "Activations are counted for one image at a time."
    was_training = model.training
    adapter = _TracingAdapter(model.eval(), [{"image": inputs[0]["image"]}])
    handlers = {**dict.fromkeys(_IGNORED_OPS, _count_nothing), **kwargs.pop("supported_ops", {})}
    counts, _ = activation_count(adapter, adapter.flattened_inputs, handlers, **kwargs)
    model.train(was_training)
    return counts


def _count_nothing(inputs: list[Any], outputs: list[Any]) -> dict[str, float]:
    return {}


def find_unused_parameters(model: nn.Module, inputs: Any) -> list[str]:
    """Names of the parameters of a model in training mode without influence on its losses."""
    assert model.training, "The model has to be in training mode to return losses."
    model.zero_grad(set_to_none=True)
    losses = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    total: Any = sum(losses.values()) if isinstance(losses, dict) else losses
    total.backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad(set_to_none=True)
    return unused
