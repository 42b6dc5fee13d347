"""Deformable map attention: the written-out formula, exact chunks, precision and odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_detr.errors import ConfigError
from efficient_detr.modeling.backbones.deformable_attention import DeformableMapAttention
from efficient_detr.modeling.backbones.deformed_keys import (
    BoundedOffsets,
    ClampedPoints,
    DeformedKeys,
    ExtendedGrid,
    HalfPixelGrid,
    KeyTokens,
    PooledKeys,
)
from efficient_detr.modeling.backbones.map_layers import DepthwiseConvolution
from efficient_detr.modeling.backbones.position_bias import (
    FixedPositionTable,
    LogPositionNetwork,
    PositionBias,
    RelativePositionTable,
)

CHANNELS, HEADS, GROUPS = 16, 4, 2
MAP = (5, 6)


def table() -> RelativePositionTable:
    return RelativePositionTable(num_heads=HEADS, map_shape=(4, 6))


def log_network() -> LogPositionNetwork:
    return LogPositionNetwork(num_heads=HEADS, num_groups=GROUPS)


def fixed_table() -> FixedPositionTable:
    return FixedPositionTable(num_heads=HEADS, map_shape=(4, 6), key_shape=(2, 3))


BIASES = pytest.mark.parametrize("bias", [table, log_network, fixed_table, lambda: None])


def keys_2022(stride: int = 2, channels: int = CHANNELS) -> DeformedKeys:
    return DeformedKeys(
        channels=channels,
        num_groups=GROUPS,
        kernel_size=5,
        stride=stride,
        grid=HalfPixelGrid(),
        limit=BoundedOffsets(range_factor=2.0),
    )


def keys_2023(stride: int = 2) -> DeformedKeys:
    return DeformedKeys(
        channels=CHANNELS,
        num_groups=GROUPS,
        kernel_size=3,
        stride=stride,
        grid=ExtendedGrid(),
        limit=ClampedPoints(),
    )


def attention(position_bias: PositionBias | None = None, **changes: Any) -> DeformableMapAttention:
    """Attention of parameters large enough for every part to matter."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = dict(channels=CHANNELS, num_heads=HEADS, keys=keys_2023())
    module = DeformableMapAttention(**{**arguments, **changes}, position_bias=position_bias)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return module


def random_map(height: int = MAP[0], width: int = MAP[1]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, height, width, CHANNELS, generator=generator)


def by_hand(module: DeformableMapAttention, features: Tensor) -> Tensor:
    """softmax(q k / sqrt(D) + bias) v for each head by itself."""
    query = module.query(features)
    tokens = module.keys(features, query)
    key, value = module.key(tokens.features), module.value(tokens.features)
    map_shape = (features.shape[1], features.shape[2])
    outputs = []
    for head in range(HEADS):
        own = slice(4 * head, 4 * head + 4)  # 16 channels, 4 heads
        logits = torch.einsum("bqc,bkc->bqk", query.flatten(1, 2)[..., own], key[..., own]) / 2
        if module.position_bias is not None:
            logits = logits + module.position_bias(tokens, map_shape, slice(None))[:, head]
        outputs.append(torch.einsum("bqk,bkc->bqc", logits.softmax(-1), value[..., own]))
    attended = torch.cat(outputs, dim=-1).reshape(features.shape)
    if module.query_convolution is not None:
        attended = attended + module.query_convolution(query)
    return module.output(attended)


def gradients(module: DeformableMapAttention, features: Tensor) -> dict[str, Tensor]:
    """Of the input and all parameters, for a loss that weights every output differently."""
    features = features.clone().requires_grad_()
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    module.zero_grad()
    (module(features) * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert features.grad is not None
    return {**found, "input": features.grad}


class CallSizes:
    """Numbers of logits of the calls of a position bias."""

    def __init__(self, module: DeformableMapAttention) -> None:
        self.sizes: list[int] = []
        assert module.position_bias is not None
        module.position_bias.register_forward_hook(self._note)

    def _note(self, module: nn.Module, arguments: tuple[Any, ...], bias: Tensor) -> None:
        self.sizes.append(bias.numel())


@BIASES
@pytest.mark.parametrize("keys", [keys_2022, keys_2023])
def test_formula(bias: Callable[[], PositionBias | None], keys: Callable[[], DeformedKeys]) -> None:
    module, features = attention(bias(), keys=keys()), random_map()
    torch.testing.assert_close(module(features), by_hand(module, features), atol=1e-5, rtol=1e-4)


def test_query_convolution_is_added_to_the_heads() -> None:
    module = attention(query_convolution=DepthwiseConvolution(channels=CHANNELS))
    features = random_map()
    found = module(features)
    torch.testing.assert_close(found, by_hand(module, features), atol=1e-5, rtol=1e-4)
    module.query_convolution = None
    assert not torch.allclose(module(features), found, atol=0.1)


def test_pooled_keys() -> None:
    module, features = attention(keys=PooledKeys(kernel_size=2)), random_map()
    torch.testing.assert_close(module(features), by_hand(module, features), atol=1e-5, rtol=1e-4)


# 9 keys of 2 images and 4 heads: 72 logits a query, so 30, 7, 2 and 1 queries a chunk.
@pytest.mark.parametrize("max_logits", [30 * 72, 7 * 72, 200, 1])
@BIASES
def test_chunks_change_nothing(bias: Callable[[], PositionBias | None], max_logits: int) -> None:
    whole, parts = attention(bias()), attention(bias(), max_logits=max_logits)
    features = random_map()
    torch.testing.assert_close(parts(features), whole(features), atol=1e-5, rtol=1e-4)
    expected, found = gradients(whole, features), gradients(parts, features)
    assert expected.keys() == found.keys() == {"input", *dict(whole.named_parameters())}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("max_logits", "queries"), [(72 * 30, [30]), (72 * 8, [8, 8, 8, 6]), (71, [1] * 30)]
)
def test_no_more_logits_at_once_than_allowed(max_logits: int, queries: list[int]) -> None:
    module = attention(table(), max_logits=max_logits)
    calls = CallSizes(module)
    with torch.no_grad():
        module(random_map())
    assert calls.sizes == [72 * n for n in queries]


@pytest.mark.parametrize(("max_logits", "calls_expected"), [(72 * 30, 1), (72 * 10, 6)])
def test_only_several_chunks_are_computed_again(max_logits: int, calls_expected: int) -> None:
    module = attention(table(), max_logits=max_logits)
    calls = CallSizes(module)
    gradients(module, random_map())
    assert len(calls.sizes) == calls_expected


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_logits() -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    features = random_map(12, 12)  # 144 queries, 36 keys: 41472 logits
    for max_logits, bound in ((2**20, 41472), (288 * 12, 0)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attention(table(), max_logits=max_logits)(features)
        # A map has 2 * 144 * 16 = 4608 numbers.
        assert (max(kept) >= bound) if bound else (max(kept) <= 4608)


def test_attention_weights() -> None:
    module, features = attention(table()), random_map()
    indices = torch.tensor([29, 0, 13])
    weights, points = module.attention_weights(features, indices)
    tokens = module.keys(features, module.query(features))
    assert weights.shape == (2, HEADS, 3, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 3))
    assert points is not None and torch.equal(points, tokens.points)
    value = module.value(tokens.features).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    attended = (weights @ value).transpose(1, 2).flatten(2)
    expected = module(features).flatten(1, 2)[:, indices]
    torch.testing.assert_close(module.output(attended), expected, atol=1e-5, rtol=1e-4)


def test_attention_weights_of_keys_without_places() -> None:
    module = attention(keys=PooledKeys(kernel_size=2))
    weights, points = module.attention_weights(random_map(), torch.tensor([4]))
    assert weights.shape == (2, HEADS, 1, 6) and points is None


class UnitKeys(PooledKeys):
    """Keys that hold 1 in a channel of their own: what a query gives shows where it looks."""

    num_groups = GROUPS

    def forward(self, features: Tensor, query: Tensor) -> KeyTokens:
        points = torch.tensor([[[-1.0, -1.0], [1.0, 1.0]], [[1.0, 1.0], [-1.0, -1.0]]])
        cell = features.new_zeros(1, 2)  # a single query in the middle
        keys = torch.eye(2, CHANNELS).expand(len(features), -1, -1)
        return KeyTokens(keys, points.expand(len(features), -1, -1, -1), cell, (1, 2))

    has_points = True


def test_heads_of_a_group_share_its_points() -> None:
    module = attention(table(), keys=UnitKeys(kernel_size=1))
    nn.init.zeros_(module.query.weight)
    nn.init.zeros_(module.query.bias)  # logits are the bias alone
    assert isinstance(module.position_bias, RelativePositionTable)
    with torch.no_grad():
        # 0 above and left of the centre, 5 below and right of it.
        module.position_bias.relative_position_bias_table.zero_()[:, 4:, 6:] = 5.0
    weights, _ = module.attention_weights(random_map(1, 1), torch.tensor([0]))
    # The query is below and right of key 0 of the first group and of key 1 of the second.
    strong = torch.tensor(5.0).sigmoid().item()
    torch.testing.assert_close(
        weights[0, :, 0],
        torch.tensor([[strong, 1 - strong]] * 2 + [[1 - strong, strong]] * 2),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BIASES
def test_autocast_is_close(bias: Callable[[], PositionBias | None], dtype: torch.dtype) -> None:
    module, features = attention(bias()), random_map()
    nn.init.normal_(module.output.weight, std=0.2, generator=torch.Generator().manual_seed(4))
    expected = module(features)
    with torch.autocast("cpu", dtype):
        found = module(features)
    assert found.dtype == dtype
    # The largest output is 3.6, whose neighbours in bfloat16 are 0.016 away.
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0)


def test_module_in_16_bits() -> None:
    module, features = attention(table(), max_logits=500), random_map()
    expected = module(features)
    found = module.to(torch.bfloat16)(features.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.2, rtol=0)  # of 6.6


@pytest.mark.parametrize("keys", [keys_2022, keys_2023, lambda: PooledKeys(kernel_size=2)])
@pytest.mark.parametrize("map_shape", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_single_rows_and_columns(keys: Callable[[], Any], map_shape: tuple[int, int]) -> None:
    chosen = keys()
    module = attention(table() if chosen.has_points else None, keys=chosen)
    features = random_map(*map_shape)
    assert module(features).isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(module, features).values())


def test_same_run_twice() -> None:
    features = random_map()
    first, second = (attention(table(), max_logits=500) for _ in range(2))
    assert torch.equal(first(features), second(features))
    expected = gradients(first, features)
    assert all(torch.equal(g, expected[name]) for name, g in gradients(second, features).items())


def test_training_mode_changes_nothing() -> None:
    module, features = attention(table()), random_map()
    assert torch.equal(module.train()(features), module.eval()(features))


def test_state_dict() -> None:
    module = attention(table(), query_convolution=DepthwiseConvolution(channels=CHANNELS))
    projections = {
        f"{name}.{kind}"
        for name in ("query", "key", "value", "output")
        for kind in ("weight", "bias")
    }
    network = {f"keys.offset_network.depthwise.{kind}" for kind in ("weight", "bias")}
    network |= {f"keys.offset_network.norm.{kind}" for kind in ("weight", "bias")}
    assert set(module.state_dict()) == {
        *projections,
        *network,
        "keys.offset_network.output.weight",
        "position_bias.relative_position_bias_table",
        "query_convolution.weight",
        "query_convolution.bias",
    }
    assert module.query.weight.shape == (CHANNELS, CHANNELS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 3}, ["channels=16", "num_heads=3"]),
        ({"num_heads": 0}, ["channels=16", "num_heads=0"]),
        ({"num_heads": 1}, ["num_heads=1", "num_groups=2"]),
        ({"keys": keys_2022(channels=32)}, ["channels=16", "channels=32"]),
        (
            {"position_bias": RelativePositionTable(num_heads=2, map_shape=MAP)},
            ["num_heads=4", "num_heads=2"],
        ),
        (
            {"position_bias": LogPositionNetwork(num_heads=4, num_groups=4)},
            ["num_groups=2", "num_groups=4"],
        ),
        (
            {"keys": PooledKeys(kernel_size=2), "position_bias": table()},
            ["RelativePositionTable", "PooledKeys"],
        ),
        ({"max_logits": 0}, ["max_logits=0"]),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        attention(**changes)
    assert all(word in str(refused.value) for word in words)
