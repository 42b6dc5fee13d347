"""What torch knows about the compiled operators: derivatives, shapes, compilers, export, costs.

Tests of what is only registered run on the meta device and so need no kernel.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from efficient_detr.ops import (
    deformable_attention_pytorch,
    deformable_sampling_locations,
    export_decompositions,
    fused_multi_scale_deformable_attention,
    multi_scale_deformable_attention,
)
from efficient_detr.ops.deformable_attention_library import OPERATORS, flat_shapes
from tests.ops.deformable_attention_cases import (
    COMPILED,
    Implementation,
    arguments,
    fused_arguments,
    gradients,
)

compiled = pytest.mark.parametrize("run", COMPILED, indirect=True)

SHAPES = [(4, 3), (2, 2)]
PLAIN = OPERATORS.multi_scale_deformable_attention
FUSED = OPERATORS.fused_multi_scale_deformable_attention


def operator_arguments(reference_size: int | None, device: str = "cpu") -> tuple:
    """Arguments of the plain operator, or of the fused one with references of that size."""
    inputs: tuple = arguments(SHAPES, dtype=torch.float32, channels=8)
    if reference_size is not None:
        inputs = fused_arguments(inputs, reference_size=reference_size)
    value, shapes, *sampling = inputs
    tensors = (tensor.to(device).requires_grad_() for tensor in (value, *sampling))
    return next(tensors), flat_shapes(shapes), *tensors


class SeenCalls(TorchDispatchMode):
    """Notes the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "efficient_detr":
            self.calls.append((func._schema.name.partition("::")[2], args))
        return func(*args, **(kwargs or {}))


def skip_on_gpu(run: Implementation) -> None:
    if run.device != "cpu":
        pytest.skip("what differs between devices is tested by opcheck")


@compiled
@pytest.mark.parametrize("reference_size", [None, 2, 4])
def test_opcheck(run: Implementation, reference_size: int | None) -> None:
    """Torch's own checks of schema, autograd, shapes and tracing, forward and backward."""
    operator = PLAIN if reference_size is None else FUSED
    inputs = operator_arguments(reference_size, run.device)
    torch.library.opcheck(operator.default, inputs)
    grad_output = torch.randn(2, 5, 24, device=run.device)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    if reference_size is None:
        backward = OPERATORS.multi_scale_deformable_attention_backward
        torch.library.opcheck(backward.default, (grad_output, *detached, False))
    else:
        backward = OPERATORS.fused_multi_scale_deformable_attention_backward
        for needs_reference in (True, False):
            torch.library.opcheck(
                backward.default, (grad_output, *detached, needs_reference, False)
            )


@pytest.mark.parametrize("reference_size", [None, 2, 4])
def test_results_without_a_kernel_have_shape_and_dtype(reference_size: int | None) -> None:
    operator = PLAIN if reference_size is None else FUSED
    value, shapes, *sampling = operator_arguments(reference_size, "meta")
    output = operator(value.detach().bfloat16().requires_grad_(), shapes, *sampling)
    assert output.shape == (2, 5, 24) and output.dtype is torch.bfloat16
    leaves = [value, *sampling]
    grads = torch.autograd.grad(operator(value, shapes, *sampling).sum(), leaves)
    for gradient, leaf in zip(grads, leaves, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype is leaf.dtype


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("needs_reference", [True, False])
def test_what_the_backward_is_asked_for(deterministic: bool, needs_reference: bool) -> None:
    """Whether it must be deterministic is asked when it runs, not when the forward did."""
    plain = PLAIN(*operator_arguments(None, "meta"))
    inputs = operator_arguments(4, "meta")
    inputs[2].requires_grad_(needs_reference)
    fused = FUSED(*inputs)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with SeenCalls() as seen:
            (plain.sum() + fused.sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    flags = dict(seen.calls)
    assert flags["multi_scale_deformable_attention_backward"][-1] is deterministic
    expected = (needs_reference, deterministic)
    assert flags["fused_multi_scale_deformable_attention_backward"][-2:] == expected


@pytest.mark.parametrize("reference_size", [None, 4])
def test_second_derivatives_are_refused(reference_size: int | None) -> None:
    operator = PLAIN if reference_size is None else FUSED
    value, *rest = operator_arguments(reference_size, "meta")
    (first,) = torch.autograd.grad(operator(value, *rest).sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_rule(device_type: str) -> None:
    """A caller of the bare operator: values stay as they are, the rest becomes float32."""

    class StopError(Exception):
        pass

    class Catch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace != "efficient_detr":
                return func(*args, **(kwargs or {}))
            raise StopError([x.dtype for x in args if isinstance(x, Tensor)])

    for operator, reference_size in ((PLAIN, None), (FUSED, 2)):
        value, shapes, *sampling = (
            x.detach().to(torch.bfloat16) if isinstance(x, Tensor) else x
            for x in operator_arguments(reference_size, device_type)
        )
        with (
            torch.autocast(device_type, dtype=torch.bfloat16),
            Catch(),
            pytest.raises(StopError) as stopped,
        ):
            operator(value, shapes, *sampling)
        dtypes = stopped.value.args[0]
        assert dtypes == [torch.bfloat16] + [torch.float32] * len(sampling)


def test_costs_in_torchs_counter() -> None:
    """Torch counts a multiply-add as 2; B Q H L P D = 2 * 5 * 3 * 2 * 3 * 8 = 1440 samples.

    Forward, 4 corners each. Backward, 4 products with the gradient and 4 sums into the values'.
    """
    for operator, reference_size, name in (
        (PLAIN, None, "multi_scale_deformable_attention"),
        (FUSED, 4, "fused_multi_scale_deformable_attention"),
    ):
        inputs = operator_arguments(reference_size, "meta")
        with FlopCounterMode(display=False) as counter:
            operator(*inputs).sum().backward()
        counts = {str(key): value for key, value in counter.get_flop_counts()["Global"].items()}
        assert counts[f"efficient_detr.{name}"] == 2 * 4 * 1440
        assert counts[f"efficient_detr.{name}_backward"] == 2 * 8 * 1440


class Attention(nn.Module):
    """The fused or the plain function on maps of fixed sizes, with arithmetic around it."""

    def __init__(self, *, fused: bool, implementation: str) -> None:
        super().__init__()
        self.function = (
            fused_multi_scale_deformable_attention if fused else multi_scale_deformable_attention
        )
        self.implementation = implementation

    def forward(self, value: Tensor, *sampling: Tensor) -> Tensor:
        output = self.function(2 * value, SHAPES, *sampling, implementation=self.implementation)
        return output.square()


BATCH_SIZES = [(2, 5), (3, 8)]  # images, queries


def compile_and_compare(
    *, fused: bool, implementation: str, backend: str, sizes: list[tuple[int, int]]
) -> None:
    """Outputs and gradients, in one graph for all sizes, equal those without compiling."""
    torch.compiler.reset()
    model = Attention(fused=fused, implementation=implementation)
    fast = torch.compile(model, fullgraph=True, backend=backend, dynamic=len(sizes) > 1)
    for batch, queries in sizes:
        inputs = arguments(SHAPES, batch=batch, queries=queries, channels=8, dtype=torch.float32)
        if fused:
            inputs = fused_arguments(inputs, reference_size=4)
        value, _, *sampling = inputs
        expected = model(value, *sampling)
        upstream = torch.randn_like(expected)
        torch.testing.assert_close(fast(value, *sampling), expected)
        ours = gradients(fast, upstream, value, *sampling)
        theirs = gradients(model, upstream, value, *sampling)
        for gradient, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, other)


@compiled
@pytest.mark.parametrize("fused", [False, True])
def test_compiles_into_one_graph(run: Implementation, fused: bool) -> None:
    skip_on_gpu(run)
    compile_and_compare(
        fused=fused, implementation="compiled", backend="aot_eager", sizes=BATCH_SIZES
    )


def test_pytorch_compiles_into_one_graph() -> None:
    # Tracing it for any size works too, but takes half a minute.
    compile_and_compare(
        fused=True, implementation="pytorch", backend="aot_eager", sizes=BATCH_SIZES[:1]
    )


@compiled
@pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")),
    reason="torch.compile needs a C++ compiler",
)
def test_compiles_with_the_default_backend(run: Implementation) -> None:
    skip_on_gpu(run)
    compile_and_compare(
        fused=True, implementation="compiled", backend="inductor", sizes=BATCH_SIZES[:1]
    )


def test_compiling_without_gradients() -> None:
    """On a CPU this is the formulation by embedding_bag."""
    model = Attention(fused=False, implementation="pytorch")
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        value, _, *sampling = arguments(SHAPES)
        torch.testing.assert_close(fast(value, *sampling), model(value, *sampling))


class Sampler(nn.Module):
    """Feature maps of any size, a layer, and one of the functions."""

    def __init__(self, *, fused: bool, implementation: str | None) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)
        self.fused, self.implementation = fused, implementation

    def forward(
        self, large: Tensor, small: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        maps = (large, small)
        shapes = [(feature_map.shape[-2], feature_map.shape[-1]) for feature_map in maps]
        tokens = torch.cat([feature_map.flatten(2).transpose(1, 2) for feature_map in maps], 1)
        value = self.projection(tokens).unflatten(2, (2, 4))
        if self.fused:
            return fused_multi_scale_deformable_attention(
                value, shapes, reference, offsets, logits, implementation=self.implementation
            )
        locations = deformable_sampling_locations(reference, offsets, shapes)
        weights = logits.flatten(3).softmax(-1).reshape(logits.shape)
        return multi_scale_deformable_attention(
            value, shapes, locations, weights, implementation=self.implementation
        )


def sampler_inputs(
    *, batch: int = 2, queries: int = 5, large: tuple[int, int] = (6, 7), reference_size: int = 4
) -> tuple[Tensor, ...]:
    return (
        torch.randn(batch, 8, *large),
        torch.randn(batch, 8, 3, 4),
        torch.rand(batch, queries, 2, reference_size),
        torch.randn(batch, queries, 2, 2, 3, 2),
        torch.randn(batch, queries, 2, 2, 3),
    )


def export(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """With any number of images and queries, and maps of any size."""
    free = Dim.DYNAMIC
    maps, rows = {0: free, 2: free, 3: free}, {0: free, 1: free}
    return torch.export.export(model, inputs, dynamic_shapes=(maps, maps, rows, rows, rows))


def called(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@compiled
@pytest.mark.parametrize("fused", [False, True])
def test_export_keeps_one_node(run: Implementation, fused: bool) -> None:
    skip_on_gpu(run)
    model = Sampler(fused=fused, implementation="compiled").eval()
    program = export(model, sampler_inputs())
    operator = FUSED if fused else PLAIN
    assert called(program).count(str(operator.default)) == 1
    other = sampler_inputs(batch=3, queries=2, large=(5, 9))
    torch.testing.assert_close(program.module()(*other), model(*other))


class BareOperator(nn.Module):
    """Calls an operator whether or not there is a kernel: exporting needs none."""

    def __init__(self, operator: torch._ops.OpOverloadPacket) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, value: Tensor, *sampling: Tensor) -> Tensor:
        return self.operator(value, flat_shapes(SHAPES), *sampling)


@pytest.mark.parametrize("reference_size", [None, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decomposition_equals_the_operator(reference_size: int | None, dtype: torch.dtype) -> None:
    operator = PLAIN if reference_size is None else FUSED
    value, _, *sampling = operator_arguments(reference_size)
    inputs = tuple(x.detach() for x in (value.to(dtype), *sampling))
    program = torch.export.export(BareOperator(operator), inputs)
    assert called(program) == [str(operator.default)]
    standard = torch.export.default_decompositions()
    program = program.run_decompositions({**standard, **export_decompositions()})
    names = called(program)
    assert not any("efficient_detr" in name for name in names)
    assert sum("grid_sampler" in name for name in names) == len(SHAPES)
    function = (
        multi_scale_deformable_attention
        if reference_size is None
        else fused_multi_scale_deformable_attention
    )
    expected = function(inputs[0], SHAPES, *inputs[1:], implementation="pytorch")
    torch.testing.assert_close(program.module()(*inputs), expected)


def test_pytorch_exports_as_grid_sample() -> None:
    """Also on a CPU, where the embedding bag would be faster."""
    model = Sampler(fused=True, implementation="pytorch").eval()
    with torch.no_grad():
        program = export(model, sampler_inputs())
        other = sampler_inputs(batch=3, queries=2, large=(5, 9))
        torch.testing.assert_close(program.module()(*other), model(*other))
    names = called(program)
    assert sum("grid_sampler" in name for name in names) == 2
    assert not any("embedding_bag" in name or "efficient_detr" in name for name in names)


def test_onnx_export_uses_no_operator_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runtimes know grid_sample; torch says that it exports to them."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    bags = []
    monkeypatch.setattr(
        deformable_attention_pytorch,
        "sample_by_embedding_bag",
        lambda *arguments: bags.append(arguments),
    )
    with torch.no_grad(), SeenCalls() as seen:
        for fused in (False, True):
            Sampler(fused=fused, implementation=None)(*sampler_inputs())
    assert seen.calls == [] and bags == []


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_function_transforms_run_in_pytorch(transform: Callable[..., Any]) -> None:
    value, shapes, locations, weights = arguments(SHAPES, channels=8)

    def total(value: Tensor) -> Tensor:
        return multi_scale_deformable_attention(value, shapes, locations, weights).sum()

    leaf = value.clone().requires_grad_()
    total(leaf).backward()
    torch.testing.assert_close(transform(total)(value), leaf.grad)


def test_forward_mode_is_refused_rather_than_zero() -> None:
    value, shapes, locations, weights = arguments(SHAPES, channels=8)

    def attend(value: Tensor) -> Tensor:
        return multi_scale_deformable_attention(value, shapes, locations, weights)

    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(attend, (value,), (value,))
