"""Fixtures of the published deformable attention of DAT by itself, forward and backward.

Stored maps are (B, C, H, W), points (B, G, Hk, Wk, 2) with (y, x).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efficient_detr.checkpoint.conversion import read_keys
from efficient_detr.checkpoint.dat import DEFORMABLE_ATTENTION
from efficient_detr.modeling.backbones.deformable_attention import DeformableMapAttention
from efficient_detr.modeling.backbones.deformed_keys import (
    BoundedOffsets,
    ClampedPoints,
    DeformedKeys,
    ExtendedGrid,
    HalfPixelGrid,
    OffsetLimit,
    PooledKeys,
    SquashedPoints,
    UnboundedOffsets,
)
from efficient_detr.modeling.backbones.map_layers import DepthwiseConvolution
from efficient_detr.modeling.backbones.position_bias import (
    FixedPositionTable,
    LogPositionNetwork,
    PositionBias,
    RelativePositionTable,
)
from tests.golden_families.fixture import Comparison
from tests.golden_families.recorder import Recorder

# Of the offset network in the code of 2022, by the index of the stage.
KERNELS = (9, 7, 5, 3)

# Absolute and relative tolerance of offsets and points right behind the input.
PLACES = 2e-6


@dataclass(frozen=True)
class AttentionOptions:
    """What the published module takes, whichever name its argument has.

    Attributes:
        code: 2022 or 2023.
        channels: C.
        num_heads: H.
        num_groups: G.
        kernel_size: of the offset network.
        stride: cells between keys.
        range_factor: of offsets.
        map_shape: that its tables are for.
        key_shape: the same of the keys' map.
        use_pe: whether there is a position bias of some kind: the next three say which.
        dwc_pe: a convolution of the queries.
        fixed_pe: a table of all pairs of query and key.
        log_cpb: a network.
        no_off: pooled keys.
    """

    code: int
    channels: int
    num_heads: int
    num_groups: int
    kernel_size: int
    stride: int
    range_factor: float
    map_shape: tuple[int, int]
    key_shape: tuple[int, int]
    use_pe: bool
    dwc_pe: bool
    fixed_pe: bool
    log_cpb: bool
    no_off: bool

    @classmethod
    def of_case(cls, info: Mapping[str, Any]) -> AttentionOptions:
        """The options in the JSON of a case."""
        args = info["args"]
        code = int(info["code"].split()[0])
        height, width = args["q_size"]
        return cls(
            code=code,
            channels=args["n_heads"] * args["n_head_channels"],
            num_heads=args["n_heads"],
            num_groups=args["n_groups"],
            kernel_size=KERNELS[args["stage_idx"]] if code == 2022 else args["ksize"],
            stride=args["stride"],
            range_factor=args["offset_range_factor"],
            map_shape=(height, width),
            key_shape=(args["kv_size"][0] // args["stride"], args["kv_size"][1] // args["stride"]),
            use_pe=args["use_pe"],
            dwc_pe=args["dwc_pe"],
            fixed_pe=args["fixed_pe"],
            log_cpb=args.get("log_cpb", False),
            no_off=args["no_off"],
        )

    def build(self) -> DeformableMapAttention:
        convolution = self.use_pe and self.dwc_pe and not self.no_off
        return DeformableMapAttention(
            channels=self.channels,
            num_heads=self.num_heads,
            keys=PooledKeys(kernel_size=self.stride) if self.no_off else self.deformed_keys(),
            position_bias=None if self.no_off else self.position_bias(),
            query_convolution=DepthwiseConvolution(channels=self.channels) if convolution else None,
        )

    def deformed_keys(self) -> DeformedKeys:
        """What chooses the keys; with `no_off` its network still exists, but nobody uses it."""
        return DeformedKeys(
            channels=self.channels,
            num_groups=self.num_groups,
            kernel_size=self.kernel_size,
            stride=self.stride,
            grid=HalfPixelGrid() if self.code == 2022 else ExtendedGrid(),
            limit=self.limit(),
            padding=self.kernel_size // 2 if self.code == 2022 else None,
        )

    def limit(self) -> OffsetLimit:
        if self.range_factor < 0:
            return SquashedPoints() if self.code == 2022 else ClampedPoints()
        if self.range_factor == 0 and self.code == 2022:
            return UnboundedOffsets()
        return BoundedOffsets(range_factor=self.range_factor)

    def position_bias(self) -> PositionBias | None:
        if not self.use_pe or self.dwc_pe:
            return None
        if self.fixed_pe:
            return FixedPositionTable(
                num_heads=self.num_heads, map_shape=self.map_shape, key_shape=self.key_shape
            )
        if self.log_cpb:
            return LogPositionNetwork(num_heads=self.num_heads, num_groups=self.num_groups)
        return RelativePositionTable(num_heads=self.num_heads, map_shape=self.map_shape)


@dataclass(frozen=True)
class Places:
    """Where the keys of one run lie, as the fixtures store it.

    Attributes:
        offset_raw: (B * G, 2, Hk, Wk) output of the offset network, (y, x).
        pos: (B, G, Hk, Wk, 2) points (y, x).
        ref: (B, G, Hk, Wk, 2) points of the grid (y, x).
    """

    offset_raw: Tensor
    pos: Tensor
    ref: Tensor

    @classmethod
    def of(cls, keys: DeformedKeys, query: Tensor, moved: bool) -> Places:
        """Find the places again, once the model has run.

        Args:
            keys: of the attention.
            query: (B, H, W, C) projected queries.
            moved: False if the points stay on the grid whatever the network says.
        """
        offsets = keys.offset_network(query)
        batch, groups, height, width, _ = offsets.shape
        points = keys(query, query).points if moved else still_points(keys, height, width)
        assert points is not None
        rows, columns = (keys.grid.key_positions(n, query.device) for n in (height, width))
        reference = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        shape = (batch, groups, height, width, 2)
        return cls(
            offset_raw=offsets.flip(-1).flatten(0, 1).permute(0, 3, 1, 2),
            pos=points.flip(-1).unflatten(-2, (height, width)).expand(shape),
            ref=reference.expand(shape),
        )


def still_points(keys: DeformedKeys, height: int, width: int) -> Tensor:
    """(Hk * Wk, 2) points (x, y) of keys that nothing moves, within their limit."""
    device = keys.offset_network.output.weight.device
    columns, rows = (keys.grid.key_positions(n, device) for n in (width, height))
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).flatten(0, 1)
    intervals = torch.tensor([keys.grid.intervals(width), keys.grid.intervals(height)])
    return keys.limit(torch.zeros_like(grid), grid, intervals)


def compare(comparison: Comparison) -> None:
    """All cases."""
    for case, info in comparison.fixture.info["cases"].items():
        compare_case(comparison, case, AttentionOptions.of_case(info), info)


def compare_case(
    comparison: Comparison, case: str, options: AttentionOptions, info: Mapping[str, Any]
) -> None:
    """One module with its weights: output, places and gradients."""
    tolerance = comparison.fixture.info["tolerance"]
    weights = {
        key: comparison.expect(f"{case}.w.{key}") for key in comparison.fixture.group(f"{case}.w.")
    }
    attention, unused = build_with_weights(options, weights)
    recorder = Recorder(attention)
    features = comparison.expect(f"{case}.x").clone().requires_grad_()
    output = attention(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    comparison.close(f"{case}.y", output, **tolerances(tolerance["forward"]))
    query = recorder.output(attention.query).detach()
    compare_places(comparison, f"{case}.", attention, unused, query, PLACES)
    output.backward(comparison.expect(f"{case}.gout"))
    compare_gradients(comparison, case, attention, features, info["params_without_grad"])


def tolerances(given: Mapping[str, Any]) -> dict[str, float]:
    """Those of the JSON, without the remark."""
    return {"atol": given["atol"], "rtol": given["rtol"]}


def build_with_weights(
    options: AttentionOptions, weights: Mapping[str, Tensor]
) -> tuple[DeformableMapAttention, DeformedKeys | None]:
    """The attention; and with pooled keys the network that the published module has, but not uses.

    Args:
        options: what to build.
        weights: official key, relative to the module -> tensor.
    """
    unused = None
    if options.no_off:
        unused = options.deformed_keys()
        own = {key: tensor for key, tensor in weights.items() if key.startswith("conv_offset.")}
        weights = {key: tensor for key, tensor in weights.items() if key not in own}
        load_weights(unused, own, "keys.")
    attention = options.build()
    load_weights(attention, weights)
    return attention.eval(), unused


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], part: str = "") -> None:
    """Load weights by official keys into (a part of) an attention; all must fit.

    Convolutions of 1x1 cells become linear layers.
    """
    read = read_keys(weights, DEFORMABLE_ATTENTION, [part + name for name in module.state_dict()])
    assert not read.unknown
    module.load_state_dict({name.removeprefix(part): read.state[name] for name in read.state})


def our_names(weights: Mapping[str, Tensor], known: Iterable[str]) -> dict[str, str]:
    """our name -> official key, both relative to the attention, whose names are `known`."""
    read = read_keys(weights, DEFORMABLE_ATTENTION, list(known))
    assert not read.unknown
    return {name: key for name, (key,) in read.sources.items()}


def compare_places(
    comparison: Comparison,
    prefix: str,
    attention: DeformableMapAttention,
    unused: DeformedKeys | None,
    query: Tensor,
    tolerance: float,
) -> None:
    """Offsets, points and grid, as far as they are stored."""
    keys = unused or attention.keys
    assert isinstance(keys, DeformedKeys)
    with torch.no_grad():
        places = Places.of(keys, query, moved=unused is None)
    for name in ("offset_raw", "pos", "ref"):
        if comparison.has(prefix + name):
            comparison.close(prefix + name, getattr(places, name), tolerance, tolerance)


def compare_gradients(
    comparison: Comparison,
    case: str,
    attention: DeformableMapAttention,
    features: Tensor,
    without: Iterable[str],
) -> None:
    """Of the input and of every parameter but those `without`; the fixture must have no others."""
    tolerance = tolerances(comparison.fixture.info["tolerance"]["grad"])
    parameters = dict(attention.named_parameters())
    expected = comparison.fixture.group(f"{case}.grad.")
    actual = {"x": features.grad}
    weights = {key: tensor for key, tensor in expected.items() if key != "x"}
    for name, key in our_names(weights, parameters).items():
        actual[key] = parameters.pop(name).grad
    # What is listed may also belong to a network that pooled keys do without.
    listed = our_names({key: torch.empty(0) for key in without}, parameters)
    assert parameters.keys() <= listed.keys(), f"{case}: no gradients of {sorted(parameters)}"
    assert all(parameter.grad is None for parameter in parameters.values()), case
    for key, gradient in actual.items():
        assert gradient is not None, f"{case}: no gradient of {key}"
        comparison.close(f"{case}.grad.{key}", gradient.reshape(expected[key].shape), **tolerance)
