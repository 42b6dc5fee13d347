"""Multiply-adds and parameters of a model, stage by stage.

fvcore (through Detectron2's ``FlopCountAnalysis``) traces the model once; the handlers of
:mod:`efficient_detr.evaluation.flop_handlers` say what each operator costs. What differs from
counting with fvcore alone:

- fused operators are counted (attention, weighted embedding bags, registered custom operators);
- the cost is split over the stages of the detector: an operator belongs to the outermost stage that
  is running, so a head shared by encoder and decoder is charged to whoever calls it, and stages add
  up;
- operators that were met but not counted are returned, including those that fvcore and Detectron2
  hide;
- a module that runs is counted even if its output is thrown away, which the tracer would drop.

One multiply-add counts as 1 FLOP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.utils.analysis import FlopCountAnalysis
from torch import Tensor, nn

from efficient_detr.evaluation.flop_handlers import FREE_OPERATORS, FlopHandler, registered_handlers

OTHER_STAGE = "other"
"""Name of the remainder: what runs or lives outside every stage, such as image normalisation."""

# Where the model is inside Detectron2's TracingAdapter (which FlopCountAnalysis makes) and
# _WitnessedModel: both hold what they wrap under the name "model".
_PATH_TO_MODEL = ("model", "model")

# The keys of Detectron2's input dictionaries that a model may need for inference.
_INFERENCE_KEYS = ("image", "height", "width")


@dataclass(frozen=True)
class FlopCount:
    """Multiply-adds of one forward pass in evaluation mode.

    Attributes:
        total: all multiply-adds.
        stages: multiply-adds per stage in the order in which the detector registers its stages, and
            a last entry ``"other"`` if something ran outside them; the values sum to ``total``.
        operators: multiply-adds per operator, ``{"aten::linear": ...}``.
        uncounted: how often each operator ran that has a cost nobody counts (softmax, top-k,
            additions...).
        image_sizes: (height, width) in pixels of every image of the batch, before padding.
    """

    total: int
    stages: dict[str, int]
    operators: dict[str, int]
    uncounted: dict[str, int]
    image_sizes: list[tuple[int, int]]


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameter elements; a parameter that several modules share counts once.

    Attributes:
        total: all parameters.
        trainable: those with ``requires_grad``.
        stages: parameters per stage, and ``"other"`` if some live outside the stages. A shared
            parameter belongs to the first stage that holds it.
        trainable_stages: the same, trainable parameters only.
    """

    total: int
    trainable: int
    stages: dict[str, int]
    trainable_stages: dict[str, int]


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without a wrapper for data-parallel training."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        wrapped: nn.Module = model.module
        return wrapped
    return model


def stage_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The stages into which counts are split.

    Args:
        model: a meta-architecture; one that has a ``detector`` is split into the children of that
            detector, any other into its own children.

    Returns:
        Name -> module in the order of registration.
    """
    model = unwrap(model)
    detector = getattr(model, "detector", None)
    return dict((detector if isinstance(detector, nn.Module) else model).named_children())


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts the parameters of a model per stage; works on any device, the meta device included.

    Args:
        model: see :func:`stage_modules`; data-parallel wrappers are looked through.
    """
    model = unwrap(model)
    every: dict[str, int] = {}
    trainable: dict[str, int] = {}
    seen: set[int] = set()
    for stage, module in [*stage_modules(model).items(), (OTHER_STAGE, model)]:
        fresh = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen.update(id(parameter) for parameter in fresh)
        if fresh or stage != OTHER_STAGE:
            every[stage] = sum(parameter.numel() for parameter in fresh)
            trainable[stage] = sum(p.numel() for p in fresh if p.requires_grad)
    return ParameterCount(sum(every.values()), sum(trainable.values()), every, trainable)


def count_flops(model: nn.Module, batched_inputs: Sequence[Mapping[str, Any]]) -> FlopCount:
    """Counts the multiply-adds of one forward pass.

    The model runs once, in evaluation mode, without gradients and without autocast. Its training
    flags and the random number generators are left as they were.

    Args:
        model: takes Detectron2's batched inputs; see :func:`stage_modules` for how it is split.
        batched_inputs: Detectron2's input dictionaries; ``image`` (3, H, W) is required, ``height``
            and ``width`` are passed on, everything else is ignored.

    Raises:
        ValueError: a handler met an operator whose shapes the trace does not contain.
    """
    model = unwrap(model)
    inputs = [{key: item[key] for key in _INFERENCE_KEYS if key in item} for item in batched_inputs]
    with _undisturbed(model):
        analysis = FlopCountAnalysis(_WitnessedModel(model), inputs)
        recorder = _Recorder(_stage_scopes(model, analysis))
        # Clearing first also drops Detectron2's list of operators to keep quiet about.
        analysis.clear_op_handles()
        analysis.set_op_handle(**dict.fromkeys(FREE_OPERATORS))
        for name, handler in registered_handlers().items():
            analysis.set_op_handle(name, recorder.handler(name, handler))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        total = int(analysis.total())
    stages = dict(recorder.stages)
    if total != sum(stages.values()):
        stages[OTHER_STAGE] = total - sum(stages.values())
    return FlopCount(
        total=total,
        stages=stages,
        operators=dict(recorder.operators.most_common()),
        uncounted=dict((analysis.unsupported_ops() + recorder.uncounted).most_common()),
        image_sizes=[_image_size(item["image"]) for item in inputs],
    )


class _WitnessedModel(nn.Module):
    """Returns, beside the predictions, an empty tensor derived from each module's output.

    The tracer drops operators whose results reach no output of the graph, although they are paid
    for (a head after every layer, of which only the last is used). The empty tensors keep them in
    the graph and no memory alive.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.witnesses: list[Tensor] = []
        for module in model.modules():
            module.register_forward_hook(self._witness)

    def forward(self, batched_inputs: Any) -> tuple[Any, list[Tensor]]:
        self.witnesses = []
        return self.model(batched_inputs), self.witnesses

    def _witness(self, module: nn.Module, inputs: Any, output: Any) -> None:
        values = output if isinstance(output, (tuple, list)) else [output]
        self.witnesses += [value.new_empty(0) for value in values if isinstance(value, Tensor)]


@dataclass
class _Recorder:
    """Notes where in the model each counted operator ran.

    fvcore's own tables per module either charge a shared module to its first owner or charge nested
    stages twice; the scope of a graph node (the modules running at that moment, outermost first)
    decides it without ambiguity.
    """

    stage_scopes: dict[str, str]  # scope name of the stage -> stage
    stages: dict[str, int] = field(init=False)
    operators: Counter[str] = field(default_factory=Counter)
    uncounted: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.stages = dict.fromkeys(self.stage_scopes.values(), 0)

    def handler(self, operator: str, handler: FlopHandler) -> FlopHandler:
        """Wraps one operator's handler so that what it counts is also noted here."""

        def note(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            count = handler(inputs, outputs)
            if count is None:
                self.uncounted[operator] += 1
                return 0
            self.operators[operator] += count
            stage = self._outermost_stage(outputs[0].node().scopeName())
            if stage is not None:
                self.stages[stage] += count
            return count

        return note

    def _outermost_stage(self, scope_path: str) -> str | None:
        """The stage of the first staged module of a path such as ``/model/model.detector/...``."""
        for scope in scope_path.split("/"):
            # A stage that is only a container (a ModuleList) never runs itself, but its members do.
            while scope:
                if scope in self.stage_scopes:
                    return self.stage_scopes[scope]
                scope = scope.rpartition(".")[0]
        return None


def _stage_scopes(model: nn.Module, analysis: FlopCountAnalysis) -> dict[str, str]:
    """Maps the name under which the trace knows a stage to the stage's own name.

    A module that is registered in several places runs under the first of its names.
    """
    path = [*_PATH_TO_MODEL]
    if isinstance(getattr(model, "detector", None), nn.Module):
        path.append("detector")
    scopes: dict[str, str] = {}
    for stage in stage_modules(model):
        scopes.setdefault(analysis.canonical_module_name(".".join([*path, stage])), stage)
    return scopes


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or autocast; afterwards everything is as it was."""
    cuda_devices = [device for device in _devices(model) if device.type == "cuda"]
    with (
        _restored_modules(model),
        torch.random.fork_rng(devices=cuda_devices),
        torch.no_grad(),
        torch.autocast("cuda" if cuda_devices else "cpu", enabled=False),
    ):
        model.eval()
        yield


@contextmanager
def _restored_modules(model: nn.Module) -> Iterator[None]:
    """Puts training flags back and removes new hooks: ours, and fvcore's if tracing fails."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    hooks = [set(_hook_ids(module)) for module in modules]
    try:
        yield
    finally:
        for module, flag, kept in zip(modules, training, hooks, strict=True):
            module.training = flag
            for table, hook_id in _hook_ids(module):
                if (table, hook_id) not in kept:
                    del getattr(module, table)[hook_id]


def _hook_ids(module: nn.Module) -> list[tuple[str, int]]:
    tables = ("_forward_pre_hooks", "_forward_hooks")
    return [(table, hook_id) for table in tables for hook_id in getattr(module, table)]


def _devices(model: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


def _image_size(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[-2:]
    return int(height), int(width)
