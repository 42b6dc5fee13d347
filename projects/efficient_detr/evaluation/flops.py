"""Multiply-adds and parameters of a model, stage by stage.

fvcore (through Detectron2's ``FlopCountAnalysis``) traces the model once; the handlers of
:mod:`efficient_detr.evaluation.flop_handlers` say what each operator costs. What differs from
counting with fvcore alone:

- fused operators are counted (attention, weighted embedding bags, registered custom operators);
- the cost is split over the stages of the detector: an operator belongs to the outermost stage that
  is running, so a head shared by encoder and decoder is charged to whoever calls it, and stages add
  up; only the heads that the decoder calls are a stage of their own;
- activations are counted in the same pass;
- operators that were met but not counted are returned, including those that fvcore and Detectron2
  hide;
- a module that runs is counted even if its output is thrown away, which the tracer would drop.

One multiply-add counts as 1 FLOP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from detectron2.utils.analysis import FlopCountAnalysis
from torch import Tensor, nn

from efficient_detr.evaluation.activation_handlers import ACTIVATION_HANDLERS
from efficient_detr.evaluation.data_dependence import DataRecorder
from efficient_detr.evaluation.flop_handlers import FREE_OPERATORS, FlopHandler, registered_handlers

OTHER_STAGE = "other"
"""Name of the remainder: what runs or lives outside every stage, such as image normalisation."""

HEADS_STAGE = "heads"
"""Prediction heads, as far as the decoder calls them."""

_CONTAINERS = {HEADS_STAGE: "decoder"}
"""Stages that are part of another stage, which counts without them."""

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
        stages: multiply-adds per stage in the order of :func:`stage_modules`, and a last entry
            ``"other"`` if something ran outside them; the values sum to ``total``.
        activations: elements that convolutions and matrix products put out, per stage; see
            :mod:`efficient_detr.evaluation.activation_handlers`.
        operators: multiply-adds per operator, ``{"aten::linear": ...}``.
        uncounted: how often each operator ran that has a cost nobody counts (softmax, top-k,
            additions...).
        image_sizes: (height, width) in pixels of every image of the batch, before padding.
        data: numbers of tokens and clusters in this very pass, means over the batch; see
            :class:`~efficient_detr.evaluation.data_dependence.DataStatistics`.
    """

    total: int
    stages: dict[str, int]
    activations: dict[str, int]
    operators: dict[str, int]
    uncounted: dict[str, int]
    image_sizes: list[tuple[int, int]]
    data: dict[str, float] = field(default_factory=dict)


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
        Name -> module in the order of registration, which is the order in which they run. After
        the decoder of a detector come its ``heads``, which it contains: counts of the decoder are
        without them, and so must be whatever is summed over stages.
    """
    model = unwrap(model)
    detector = getattr(model, "detector", None)
    if not isinstance(detector, nn.Module):
        return dict(model.named_children())
    stages: dict[str, nn.Module] = {}
    for name, module in detector.named_children():
        stages[name] = module
        for part, container in _CONTAINERS.items():
            nested = getattr(module, part, None)
            if name == container and isinstance(nested, nn.Module):
                stages[part] = nested
    return stages


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts the parameters of a model per stage; works on any device, the meta device included.

    Args:
        model: see :func:`stage_modules`; data-parallel wrappers are looked through.
    """
    model = unwrap(model)
    modules = {**stage_modules(model), OTHER_STAGE: model}
    fresh: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for stage in _parts_first(modules):
        fresh[stage] = [p for p in modules[stage].parameters() if id(p) not in seen]
        seen.update(id(parameter) for parameter in fresh[stage])
    shown = [stage for stage in modules if fresh[stage] or stage != OTHER_STAGE]
    every = {stage: sum(p.numel() for p in fresh[stage]) for stage in shown}
    trainable = {stage: sum(p.numel() for p in fresh[stage] if p.requires_grad) for stage in shown}
    return ParameterCount(sum(every.values()), sum(trainable.values()), every, trainable)


def _parts_first(stages: Iterable[str]) -> list[str]:
    """The stages in their order, but each before the one that contains it."""
    ordered = list(stages)
    for part, container in _CONTAINERS.items():
        if part in ordered and container in ordered:
            ordered.remove(part)
            ordered.insert(ordered.index(container), part)
    return ordered


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
    data = DataRecorder(model)
    with _undisturbed(model):
        data.start()
        analysis = FlopCountAnalysis(_WitnessedModel(model), inputs)
        recorder = _Recorder(list(stage_modules(model)), _stage_scopes(model, analysis))
        # Clearing first also drops Detectron2's list of operators to keep quiet about.
        analysis.clear_op_handles()
        analysis.set_op_handle(**dict.fromkeys(FREE_OPERATORS))
        for name, handler in registered_handlers().items():
            analysis.set_op_handle(name, recorder.handler(name, handler))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        total = int(analysis.total())
    return FlopCount(
        total=total,
        stages=_without_empty_rest(recorder.stages),
        activations=_without_empty_rest(recorder.activations),
        operators=dict(recorder.operators.most_common()),
        uncounted=dict((analysis.unsupported_ops() + recorder.uncounted).most_common()),
        image_sizes=[_image_size(item["image"]) for item in inputs],
        data=dict(data.statistics().means()),
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
        self.witnesses += [value.new_empty(0) for value in _tensors_in(output)]


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors that a module puts out, by themselves or in sequences and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors_in(value)
    elif is_dataclass(output):
        for attribute in fields(output):
            yield from _tensors_in(getattr(output, attribute.name))


@dataclass
class _Recorder:
    """Notes where in the model each counted operator ran.

    fvcore's own tables per module either charge a shared module to its first owner or charge nested
    stages twice; the scope of a graph node (the modules running at that moment, outermost first)
    decides it without ambiguity.
    """

    stage_names: Sequence[str]
    stage_scopes: dict[str, list[str]]  # scope name of a module -> stages that it stands for
    stages: dict[str, int] = field(init=False)
    activations: dict[str, int] = field(init=False)
    operators: Counter[str] = field(default_factory=Counter)
    uncounted: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        names = [*self.stage_names, OTHER_STAGE]
        self.stages, self.activations = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def handler(self, operator: str, handler: FlopHandler) -> FlopHandler:
        """Wraps one operator's handler so that what it counts is also noted here."""
        count_activations = ACTIVATION_HANDLERS.get(operator)

        def note(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            count = handler(inputs, outputs)
            if count is None:
                self.uncounted[operator] += 1
                return 0
            stage = self._stage(outputs[0].node().scopeName())
            self.operators[operator] += count
            self.stages[stage] += count
            if count_activations is not None:
                self.activations[stage] += count_activations(inputs, outputs) or 0
            return count

        return note

    def _stage(self, scope_path: str) -> str:
        """The stage that pays for a path of modules such as ``/model/model.detector/...``.

        It is the outermost one, or that part of it which is a stage of its own.
        """
        found = OTHER_STAGE
        for scope in scope_path.split("/"):
            for stage in self._stages_of_module(scope):
                if found in (OTHER_STAGE, _CONTAINERS.get(stage)):
                    found = stage
        return found

    def _stages_of_module(self, scope: str) -> list[str]:
        # A stage that is only a container (a ModuleList) never runs itself, but its members do.
        while scope:
            if scope in self.stage_scopes:
                return self.stage_scopes[scope]
            scope = scope.rpartition(".")[0]
        return []


def _without_empty_rest(stages: Mapping[str, int]) -> dict[str, int]:
    return {stage: count for stage, count in stages.items() if count or stage != OTHER_STAGE}


def _stage_scopes(model: nn.Module, analysis: FlopCountAnalysis) -> dict[str, list[str]]:
    """Maps names under which the trace knows modules to the stages that these stand for.

    A module that is registered in several places runs under the first of its names. So each member
    of a container, such as a head that the proposals share, stands for the container's stage, too.
    """
    root = ".".join(_PATH_TO_MODEL)
    paths = {id(module): name for name, module in model.named_modules()}
    scopes: dict[str, list[str]] = {}
    for stage, module in stage_modules(model).items():
        members = [module, *(module.children() if stage in _CONTAINERS else ())]
        for path in dict.fromkeys(paths[id(member)] for member in members):
            scopes.setdefault(analysis.canonical_module_name(f"{root}.{path}"), []).append(stage)
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
