"""Cases of multi-scale deformable attention: encoder, decoder, training, precisions.

Sizes are those of an image of 800 x 1333 pixels: 4 levels, S = 22223 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from kernel_benchmark.case import COMPILED, Case, Comparison, Contender, Plan
from kernel_benchmark.formulations import (
    find_other_packages,
    sample_as_usual,
    usual_arithmetic,
    with_arithmetic,
)
from kernel_benchmark.workload import Function, Sizes, Workload, make_workload

from efficient_detr.ops import (
    fused_multi_scale_deformable_attention,
    library,
    multi_scale_deformable_attention,
)
from efficient_detr.ops.deformable_attention_pytorch import (
    sample_by_embedding_bag,
    sample_by_grid_sample,
)

GRID_SAMPLE = "grid_sample"
EMBEDDING_BAG = "embedding_bag"
OUR_GRID_SAMPLE = "grid_sample of this project"
UNFUSED = "compiled, unfused"
ROUNDED_LOCATIONS = "grid_sample, 16-bit locations"

IMAGE_LEVELS = [(100, 167), (50, 84), (25, 42), (13, 21)]
SMALL_LEVELS = [(10, 17), (5, 9), (3, 5), (2, 3)]
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Relative to the largest number of a tensor. float32 resolves a column of the widest level to 1e-5
# pixels, which moves samples by as much and gradients of locations by twice that; 16 bits are
# rounded to once, at the end.
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

_REQUIRED = {
    "encoder_forward": 20.0,
    "encoder_training": 15.0,
    "encoder_random_forward": 10.0,
    "decoder_forward": 7.0,
    "decoder_training": 6.0,
    "fallback_encoder_forward": 2.5,
}


def plan_attention(device: torch.device, precisions: list[str], *, small: bool) -> Iterator[Plan]:
    """All cases, those of float32 first."""
    levels = SMALL_LEVELS if small else IMAGE_LEVELS
    many, few = (20, 10) if small else (900, 300)
    cases = {
        "encoder": Sizes(levels, 1, None),
        "encoder_batch2": Sizes(levels, 2, None),
        "encoder_random": Sizes(levels, 1, None, random=True),
        "decoder": Sizes(levels, 1, many),
        "decoder_300": Sizes(levels, 1, few),
    }
    if "fp32" in precisions:
        for name, sizes in cases.items():
            yield from _plans(device, name, sizes, "fp32", fused=False)
        for name in ("encoder", "decoder"):
            yield from _plans(device, f"{name}_fused", cases[name], "fp32", fused=True)
    for precision in precisions:
        if precision != "fp32":
            for name in ("encoder", "encoder_batch2", "decoder"):
                yield from _plans(device, name, cases[name], precision, fused=False)


def _plans(
    device: torch.device, name: str, sizes: Sizes, precision: str, *, fused: bool
) -> Iterator[Plan]:
    queries = "Q = S" if sizes.queries is None else f"Q {sizes.queries}"
    for training in (False, True):
        row = f"{name}_{'training' if training else 'forward'}"
        if precision != "fp32":
            row += f"_{precision}"
        comparisons = [Comparison(row, COMPILED, (GRID_SAMPLE,), _REQUIRED.get(row))]
        if fused:
            comparisons.append(Comparison(f"{row}_over_unfused", COMPILED, (UNFUSED,)))
        elif _compares_in_pytorch(sizes, PRECISIONS[precision]):
            fallback = f"fallback_{row}"
            comparisons.append(
                Comparison(fallback, EMBEDDING_BAG, (GRID_SAMPLE,), _REQUIRED.get(fallback))
            )
        work = "forward and backward" if training else "forward"
        title = f"{name}: B {sizes.batch}, {queries}, {precision}, {work}"
        build = partial(
            build_case, device, sizes, fused=fused, training=training, dtype=PRECISIONS[precision]
        )
        yield Plan(title, tuple(comparisons), build)


def _compares_in_pytorch(sizes: Sizes, dtype: torch.dtype) -> bool:
    """Whether the project's own PyTorch formulations take part: once a shape is enough."""
    return sizes.batch == 1 and dtype == torch.float32


def build_case(
    device: torch.device, sizes: Sizes, *, fused: bool, training: bool, dtype: torch.dtype
) -> Case:
    """Draws the inputs and gathers the contenders."""
    workload = make_workload(sizes, device, fused=fused, training=training, dtype=dtype)
    # PyTorch's formulations are slow and inaccurate in 16 bits: they get the same rounded values in
    # float32.
    as_float32 = workload.converted(torch.float32, torch.float32)
    contenders: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    reason = library.missing_reason(device)
    if reason:
        missing[COMPILED] = reason
    else:
        contenders |= _compiled(workload, fused=fused)
    if fused:
        contenders[GRID_SAMPLE] = _contender(as_float32, usual_arithmetic, ours=False)
    else:
        with_ours = _compares_in_pytorch(sizes, dtype)
        contenders |= _in_pytorch(as_float32, with_ours=with_ours)
        others, missing_others = find_other_packages(device)
        missing |= missing_others
        all_rounded = workload.converted(dtype, dtype)
        if dtype != torch.float32 and not training:
            # What rounding the locations costs, apart from the arithmetic.
            rounded = all_rounded.converted(torch.float32, torch.float32)
            contenders[ROUNDED_LOCATIONS] = _contender(rounded, sample_as_usual, ours=False)
        for name, sample in others.items():
            contenders[name] = _contender(all_rounded, sample, ours=False)
    if device.type == "cuda" and sizes.queries is not None and not training:
        for name in [name for name in (COMPILED, GRID_SAMPLE) if name in contenders]:
            contenders[f"{name}, CUDA graph"] = _graphed(contenders[name])
    exact = usual_arithmetic if fused else sample_as_usual
    return Case(
        contenders=contenders,
        exact=partial(workload.exact, exact),
        tolerance=_TOLERANCES[dtype] * (2 if training else 1),
        compulsory_bytes=workload.compulsory_bytes(),
        missing=missing,
    )


def _compiled(workload: Workload, *, fused: bool) -> dict[str, Contender]:
    plain = partial(multi_scale_deformable_attention, implementation="compiled")
    if not fused:
        return {COMPILED: _contender(workload, plain)}
    function = partial(fused_multi_scale_deformable_attention, implementation="compiled")
    return {
        COMPILED: _contender(workload, function),
        UNFUSED: _contender(workload, partial(with_arithmetic, plain)),
    }


def _in_pytorch(workload: Workload, *, with_ours: bool) -> dict[str, Contender]:
    contenders = {GRID_SAMPLE: _contender(workload, sample_as_usual, ours=False)}
    if with_ours:
        contenders[EMBEDDING_BAG] = _contender(workload, sample_by_embedding_bag)
        contenders[OUR_GRID_SAMPLE] = _contender(workload, sample_by_grid_sample)
    return contenders


def _contender(workload: Workload, function: Function, *, ours: bool = True) -> Contender:
    return Contender(partial(workload.run, function), partial(workload.result, function), ours)


def _graphed(contender: Contender) -> Contender:
    """The same work recorded once and replayed, which costs the host a single launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        contender.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender.run()
    return replace(contender, run=graph.replay)
