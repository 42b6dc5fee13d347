"""Clustered attention: against loops, against dense attention, and when it is which of the two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_detr.errors import ConfigError
from efficient_detr.evaluation import count_flops
from efficient_detr.modeling.attention.clustered import (
    ClusteredAttention,
    ClusteredEncoderAttention,
    ClusteredSelfAttention,
    clustered_attentions,
    exact_attention,
    log_shares,
)
from efficient_detr.modeling.attention.dense import DenseEncoderAttention, SelfAttention
from efficient_detr.modeling.attention.token_clustering import TokenClustering
from efficient_detr.ops.lsh_clustering import ClusterAssignment
from efficient_detr.structures import FeatureTokens
from tests.tiny_models import random_tokens, randomised

CHANNELS, HEADS, D = 16, 2, 8
SIDES = ["query", "key", "both"]


def clustering(rounds: int = 3, width: float = 4.0, **options: Any) -> TokenClustering:
    return TokenClustering(head_channels=D, rounds=rounds, width=width, **options)


def build(
    side: str = "query",
    kind: Callable[..., ClusteredAttention] = ClusteredAttention,
    *,
    hashing: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Attention that always clusters, with weights that are not tiny."""
    hashing = hashing or {}
    parts = {
        "query_clustering": None if side == "key" else clustering(**hashing),
        "key_clustering": None if side == "query" else clustering(**{"seed": 7, **hashing}),
    }
    options = {"min_tokens": 0, "max_cluster_ratio": 1.0, **options}
    attention = kind(channels=CHANNELS, num_heads=HEADS, **parts, **options)
    randomised(attention, 0.4)
    return attention.eval()


def draw(batch: int = 2, queries: int = 11, keys: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of queries, keys and values; keys, which are hashed unscaled, are shorter."""
    query = 2.0 * torch.randn(batch, HEADS, queries, D)
    key, value = 0.7 * torch.randn(2, batch, HEADS, keys, D)
    return query, key, value


def record(part: TokenClustering) -> list[ClusterAssignment]:
    """What a clustering gives from now on."""
    given: list[ClusterAssignment] = []
    part.register_forward_hook(lambda module, args, output: given.append(output))
    return given


def recorded(attention: ClusteredAttention) -> dict[str, list[ClusterAssignment]]:
    parts = {"query": attention.query_clustering, "key": attention.key_clustering}
    return {name: record(part) for name, part in parts.items() if part is not None}


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ids: list[int],
    key_ids: list[int],
    temperature: float,
) -> Tensor:
    """One head (N, D) in loops; ids of -1 are left out, other ids tell clusters apart."""
    output = torch.zeros_like(query)
    prototypes, averages, counts = [], [], []
    for cluster in sorted(set(key_ids) - {-1}):
        members = [i for i, other in enumerate(key_ids) if other == cluster]
        prototypes.append(sum(key[i] for i in members) / len(members))
        averages.append(sum(value[i] for i in members) / len(members))
        counts.append(len(members))
    for cluster in set(query_ids) - {-1}:
        members = [i for i, other in enumerate(query_ids) if other == cluster]
        prototype = sum(query[i] for i in members) / len(members)
        weights = [
            count * math.exp(temperature * float(prototype @ k) / math.sqrt(D))
            for k, count in zip(prototypes, counts, strict=True)
        ]
        mixed = sum(w * v for w, v in zip(weights, averages, strict=True)) / sum(weights)
        for i in members:
            output[i] = mixed
    return output


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("is_padded", [False, True])
def test_formula(side: str, is_padded: bool) -> None:
    attention = build(side, temperature=0.7)
    given = recorded(attention)
    query, key, value = draw()
    query_padding = key_padding = None
    if is_padded:
        query_padding, key_padding = torch.rand(2, 11) < 0.3, torch.rand(2, 9) < 0.3
    output = attention.attend_heads_in_clusters(query, key, value, query_padding, key_padding)
    singles = {"query": torch.arange(11), "key": torch.arange(9)}
    for image in range(2):
        for head in range(HEADS):
            ids = {
                name: given[name][0].ids[image, head] if name in given else singles[name]
                for name in singles
            }
            if key_padding is not None:
                ids["key"] = ids["key"].masked_fill(key_padding[image], -1)
            row = (x[image, head] for x in (query, key, value))
            expected = by_hand(*row, ids["query"].tolist(), ids["key"].tolist(), 0.7)
            torch.testing.assert_close(output[image, head], expected)
    for name, assignments in given.items():
        # Otherwise the above compares dense attention.
        assert assignments[0].num_clusters.max() < len(singles[name])
        assert assignments[0].num_clusters.min() > 1


@pytest.mark.parametrize("side", SIDES)
def test_a_cluster_for_each_token_is_dense_attention(side: str) -> None:
    attention = build(side, hashing=dict(rounds=24, width=0.01), temperature=1.3)
    heads = draw()
    clustered = attention.attend_heads_in_clusters(*heads)
    with exact_attention(attention):
        torch.testing.assert_close(clustered, attention.attend_heads_in_clusters(*heads))


def test_equal_queries_share_a_cluster_and_lose_nothing() -> None:
    attention = build()
    query, key, value = draw(queries=5)
    repeated = query.repeat(1, 1, 40, 1)
    given = record(attention.query_clustering)
    output = attention.attend_heads_in_clusters(repeated, key, value)
    assert given[0].num_clusters.max() <= 5
    expected = attention.attend_heads_in_clusters(query, key, value).repeat(1, 1, 40, 1)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("side", SIDES)
def test_gradients(side: str) -> None:
    """Against finite differences, which are far too small to move a token to another cluster."""
    attention = build(side, temperature=0.7).double()
    heads = [x.double().requires_grad_() for x in draw(batch=1, queries=6, keys=5)]
    padding = torch.tensor([[False, False, True, False, False]])
    given = recorded(attention)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.attend_heads_in_clusters(query, key, value, None, padding)

    assert torch.autograd.gradcheck(attend, heads)
    for assignments in given.values():
        assert all(other.ids.equal(assignments[0].ids) for other in assignments)


def test_members_of_a_cluster_get_equal_gradients() -> None:
    attention = build(hashing=dict(rounds=2, width=100.0, bias_range=100.0))
    attention.query_clustering.set_projections(torch.zeros(D, 2), torch.ones(2))  # one cluster
    query, key, value = draw()
    output = attention.attend_heads_in_clusters(query.requires_grad_(), key, value)
    gradient = torch.autograd.grad((output * torch.randn_like(output)).sum(), query)[0]
    torch.testing.assert_close(gradient, gradient[:, :, :1].expand_as(gradient))
    assert gradient.abs().sum() > 0


# In an encoder -----------------------------------------------------------------------------------


def attend(attention: Any, tokens: FeatureTokens) -> Tensor:
    return attention(
        tokens.features, tokens.positions, tokens.reference_points, tokens, tokens.padding_mask
    )


def image_of(tokens: FeatureTokens, image: int) -> FeatureTokens:
    """One image of a batch without its padding; only what dense and clustered attention look at."""
    kept = ~tokens.padding_mask[image]
    return dataclasses.replace(
        tokens,
        features=tokens.features[image : image + 1, kept],
        positions=tokens.positions[image : image + 1, kept],
        padding_mask=tokens.padding_mask[image : image + 1, kept],
        reference_points=tokens.reference_points[image : image + 1, kept],
    )


def padded_tokens() -> FeatureTokens:
    return random_tokens([(6, 8)], channels=CHANNELS, sizes=[(48, 40), (24, 64), (48, 64)])


def compare_with_images_alone(attention: Any, tokens: FeatureTokens) -> list[float]:
    """The largest difference of each image in the batch and alone."""
    together = attend(attention, tokens)
    differences = []
    for image, padding in enumerate(tokens.padding_mask):
        alone = attend(attention, image_of(tokens, image))
        differences.append(float((together[image, ~padding] - alone[0]).abs().max().detach()))
    return differences


@pytest.mark.parametrize("side", SIDES)
def test_padded_batch_equals_the_images_alone(side: str) -> None:
    attention = build(side, ClusteredEncoderAttention)
    assert max(compare_with_images_alone(attention, padded_tokens())) < 1e-5


def test_included_padding_changes_results() -> None:
    attention = build(kind=ClusteredEncoderAttention, hashing=dict(include_padding=True))
    given = record(attention.query_clustering)
    first, second, unpadded = compare_with_images_alone(attention, padded_tokens())
    assert min(first, second) > 1e-3 and unpadded < 1e-5
    assert given[0].ids.min() == 0  # padded tokens have clusters, too


@pytest.mark.parametrize("side", SIDES)
def test_the_choice_of_an_image_does_not_depend_on_its_batch(side: str) -> None:
    """The images have 30, 24 and 48 tokens: the second is dense, by size or by ratio."""
    tokens = padded_tokens()
    attention = build(side, ClusteredEncoderAttention, min_tokens=25)
    assert max(compare_with_images_alone(attention, tokens)) < 1e-5
    always = build(side, ClusteredEncoderAttention)
    always.load_state_dict(attention.state_dict())
    mixed, clustered = attend(attention, tokens), attend(always, tokens)
    with exact_attention(always):
        dense = attend(always, tokens)
    real = ~tokens.padding_mask
    for image, expected in enumerate([clustered, dense, clustered]):
        kept = real[image]
        torch.testing.assert_close(mixed[image, kept], expected[image, kept])
    assert (clustered - dense)[real].abs().max() > 1e-3


def test_gradients_of_mixed_batches() -> None:
    tokens = padded_tokens()
    attention = build(kind=ClusteredEncoderAttention, min_tokens=25)
    upstream = torch.randn(3, 48, CHANNELS).masked_fill(tokens.padding_mask[..., None], 0)
    attend(attention, tokens).backward(upstream)
    together = [p.grad.clone() for p in attention.parameters()]
    attention.zero_grad()
    for image, padding in enumerate(tokens.padding_mask):
        attend(attention, image_of(tokens, image)).backward(upstream[image : image + 1, ~padding])
    for parameter, gradient in zip(attention.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


def test_selected_tokens_attend_to_all() -> None:
    """A token selection updates some tokens: fewer queries than keys, some of them fillers."""
    tokens = random_tokens([(6, 8)], channels=CHANNELS)
    attention = build(kind=ClusteredEncoderAttention)
    chosen = torch.tensor([[5, 3, 40, 17, 8, 9, 30]])
    active = tokens.gather(chosen, torch.tensor([6]))
    given = record(attention.query_clustering)
    output = attention(
        active.features, active.positions, active.reference_points, tokens, active.padding_mask
    )
    assert given[0].ids.shape == (1, HEADS, 7)
    assert given[0].ids[0, :, -1].eq(-1).all()
    unfilled = tokens.gather(chosen[:, :6], torch.tensor([6]))
    expected = attention(
        *(unfilled.features, unfilled.positions, unfilled.reference_points),
        tokens,
        unfilled.padding_mask,
    )
    torch.testing.assert_close(output[:, :6], expected)


# Dense instead -----------------------------------------------------------------------------------


def test_few_tokens_are_not_hashed() -> None:
    tokens = padded_tokens()
    attention = build(kind=ClusteredEncoderAttention, min_tokens=49)
    given = record(attention.query_clustering)
    dense = DenseEncoderAttention(channels=CHANNELS, num_heads=HEADS)
    dense.load_state_dict(attention.state_dict())  # strict: the same parameters and nothing else
    torch.testing.assert_close(attend(attention, tokens), attend(dense, tokens))
    assert given == []


@pytest.mark.parametrize("side", SIDES)
def test_many_clusters_are_not_used(side: str) -> None:
    """At the ratio itself, clustering is still used; for both sides, ratios are multiplied."""
    heads = draw(batch=1)
    attention = build(side)
    given = recorded(attention)
    clustered = attention.attend_heads_in_clusters(*heads)
    tokens = {"query": 11, "key": 9}
    ratio = math.prod(int(a[0].num_clusters.max()) / tokens[name] for name, a in given.items())
    with exact_attention(attention):
        dense = attention.attend_heads_in_clusters(*heads)
    assert (clustered - dense).abs().max() > 1e-3
    for limit, expected in ((ratio + 1e-4, clustered), (ratio - 1e-4, dense)):
        attention.max_cluster_ratio = limit
        torch.testing.assert_close(attention.attend_heads_in_clusters(*heads), expected)


def test_exact_attention_nests_and_survives_errors() -> None:
    modules = torch.nn.ModuleList([build(), build("key"), torch.nn.Linear(2, 2)])
    first, second = clustered_attentions(modules)

    def states() -> tuple[bool, bool]:
        return first.exact, second.exact

    with exact_attention(modules):
        assert states() == (True, True)
        with exact_attention(first):
            assert states() == (True, True)
        assert states() == (True, True)
    assert states() == (False, False)
    with exact_attention(first):
        with pytest.raises(RuntimeError, match="on purpose"), exact_attention(modules):
            raise RuntimeError("on purpose")
        assert states() == (True, False)
    assert states() == (False, False)


class OnTokens(torch.nn.Module):
    """Runs an attention on given tokens, whatever the image."""

    def __init__(self, attention: Any, tokens: FeatureTokens) -> None:
        super().__init__()
        self.attention, self.tokens = attention, tokens

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        return attend(self.attention, self.tokens)


def test_cost() -> None:
    """N tokens of d channels in C clusters: 4 N d^2 for projections, 2 C N d for the products,
    N d T for hashing, N d for averaging; C is that of the head that has most."""
    attention = build(kind=ClusteredEncoderAttention)
    tokens = random_tokens([(6, 8)], channels=CHANNELS)
    given = record(attention.query_clustering)
    model, inputs = OnTokens(attention, tokens), [{"image": torch.zeros(3, 8, 8)}]
    cost = count_flops(model, inputs).total
    clusters, n, d = int(given[0].num_clusters.max()), 48, CHANNELS
    assert clusters < n
    assert cost == 4 * n * d**2 + 2 * clusters * n * d + n * d * 3 + n * d
    with exact_attention(attention):
        assert count_flops(model, inputs).total == 4 * n * d**2 + 2 * n * n * d


# Among decoder queries ---------------------------------------------------------------------------


def dense_twin(attention: ClusteredAttention) -> SelfAttention:
    dense = SelfAttention(channels=CHANNELS, num_heads=HEADS).eval()
    dense.load_state_dict(attention.state_dict())
    return dense


def test_self_attention_clusters_queries() -> None:
    attention = build("both", ClusteredSelfAttention)
    query, position = torch.randn(2, 30, CHANNELS), torch.randn(2, 30, CHANNELS)
    given = recorded(attention)
    output = attention(query, position)
    assert given["query"][0].num_clusters.max() < 30
    heads = attention.project(query + position, query + position, query)
    expected = attention.merge(attention.attend_heads_in_clusters(*heads))
    torch.testing.assert_close(output, expected)
    assert (output - dense_twin(attention)(query, position)).abs().max() > 1e-3


def test_self_attention_with_a_mask_is_dense() -> None:
    attention = build(kind=ClusteredSelfAttention)
    query, position = torch.randn(2, 30, CHANNELS), torch.randn(2, 30, CHANNELS)
    blocked = torch.rand(30, 30) < 0.4
    blocked.fill_diagonal_(False)
    given = record(attention.query_clustering)
    expected = dense_twin(attention)(query, position, blocked)
    torch.testing.assert_close(attention(query, position, blocked), expected)
    assert given == []


# Hashing -----------------------------------------------------------------------------------------


def test_hashing_depends_on_the_scaled_query() -> None:
    """One direction along the first channel, cells of width 1: 2.9 / sqrt(8) = 1.03, 1.6 / sqrt(8)
    = 0.57 and 2.5 / sqrt(8) = 0.88. Unscaled, the first and the last would share a cell."""
    attention = build(hashing=dict(rounds=1, width=1.0))
    attention.query_clustering.set_projections(torch.eye(D)[:, :1], torch.zeros(1))
    query = torch.zeros(1, HEADS, 3, D)
    query[..., 0] = torch.tensor([2.9, 1.6, 2.5])
    given = record(attention.query_clustering)
    attention.attend_heads_in_clusters(query, *draw(batch=1)[1:])
    assert given[0].ids.tolist() == [[[0, 1, 1]] * HEADS]


@pytest.mark.parametrize("side", ["query", "key"])
def test_mixed_precision_hashes_in_float32(side: str) -> None:
    attention = build(side, ClusteredEncoderAttention, hashing=dict(rounds=16))
    tokens = padded_tokens()
    part = attention.query_clustering or attention.key_clustering
    calls: list[tuple[Any, ClusterAssignment]] = []
    part.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(attention, tokens)
    points, padding = calls[0][0]
    assert part(points.float(), padding).ids.equal(calls[0][1].ids)
    if side == "query":  # The scaling is no power of two, so its product needs more than 16 bits.
        assert points.dtype is torch.float32
    expected = attend(attention, tokens)[~tokens.padding_mask]
    difference = (output[~tokens.padding_mask].float() - expected).abs().mean()
    assert difference < 0.1 * expected.abs().mean()


# What does not fit -------------------------------------------------------------------------------


def test_wrong_attention() -> None:
    with pytest.raises(ConfigError, match="clusters nothing"):
        ClusteredEncoderAttention(channels=CHANNELS, num_heads=HEADS)
    with pytest.raises(ConfigError, match=r"key_clustering.head_channels=8.*num_heads = 4"):
        ClusteredEncoderAttention(channels=CHANNELS, num_heads=4, key_clustering=clustering())


def test_log_shares_are_relative_to_the_largest_cluster() -> None:
    """Counts 1, 0 and 2 of a head, so log 1/2, log 0 and log 1; a head without members has none."""
    shares = log_shares(torch.tensor([[[1, 0, 2], [0, 0, 0]]]), torch.float64)
    half = math.log(0.5)
    expected = torch.tensor([[[half, -math.inf, 0.0], [-math.inf] * 3]], dtype=torch.float64)
    torch.testing.assert_close(shares, expected)
